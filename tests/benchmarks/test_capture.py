"""Captured layers are what SDPA is called with, and files give them back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.capture import capture, describe
from benchmarks.captured import Layer, load_layer, save_layer
from s2o_compile._console import UsageError
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept

from ..passes.models import padding, tiny, tokens


def record(model: Any, inputs: dict[str, Any], layers: set[int] | None = None) -> list[Layer]:
    found: list[Layer] = []
    capture(model, inputs, found.append, layers)
    return found


def test_a_capture_is_what_sdpa_is_called_with(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama"), tokens(40, batch=1)
    found = record(model, {"input_ids": ids})
    calls: list[tuple[torch.Tensor, ...]] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((query[0], key[0], value[0]))
        return sdpa(query, key, value, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    with torch.no_grad():
        model(ids)
    assert [layer.name for layer in found] == ["layer00", "layer01"] and len(calls) == 2
    for layer, call in zip(found, calls, strict=True):
        assert (layer.query.shape, layer.key.shape) == ((4, 40, 8), (2, 40, 8))
        assert all(torch.equal(*pair) for pair in zip((layer.query, layer.key, layer.value), call, strict=True))
        assert layer.scale == 8**-0.5


def test_only_the_layers_asked_for() -> None:
    assert [layer.name for layer in record(tiny("qwen2"), {"input_ids": tokens(20, batch=1)}, {1})] == ["layer01"]


def test_the_model_goes_on_as_before() -> None:
    model, ids = tiny("llama"), tokens(40, batch=1)
    outputs: list[torch.Tensor] = []

    def dense(call: SdpaInputs) -> torch.Tensor:
        return call.dense()

    with torch.no_grad():
        outputs.append(model(ids).logits)
        with SdpaIntercept(dense):
            outputs.append(model(ids).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("inputs", [{"attention_mask": padding(40, "left")}, {}])
def test_other_attention_is_refused(inputs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="Layer 0 cannot be captured"):
        record(tiny("llama"), {"input_ids": tokens(40), **inputs})


def test_layers_that_never_run_are_named() -> None:
    with pytest.raises(UsageError, match="Layer 5 cannot be captured: SDPA was called 2 times"):
        record(tiny("llama"), {"input_ids": tokens(20, batch=1)}, {0, 5})


def test_files_give_back_the_layer(tmp_path: Path) -> None:
    (layer,) = record(tiny("llama"), {"input_ids": tokens(40, batch=1)}, {1})
    path = tmp_path / "layer01.safetensors"
    save_layer(layer, path)
    again = load_layer(path)
    assert (again.name, again.scale) == (layer.name, layer.scale)
    assert again.facts.items() >= {"layer": "1", "query_heads": "4", "key_heads": "2"}.items()
    assert torch.equal(again.query, layer.query) and torch.equal(again.value, layer.value)
    query, key, value = again.head(3)
    assert torch.equal(query, layer.query[3]) and torch.equal(key, layer.key[1]) and torch.equal(value, layer.value[1])


def test_a_single_kv_head_may_leave_out_its_axis(tmp_path: Path) -> None:
    q, k, v = torch.randn(4, 10, 16), torch.randn(10, 16), torch.randn(10, 16)
    save_file({"q": q.bfloat16(), "k": k.bfloat16(), "v": v.bfloat16()}, tmp_path / "layer08.safetensors")
    layer = load_layer(tmp_path / "layer08.safetensors")
    assert layer.key.shape == (1, 10, 16) and layer.scale == 0.25
    assert layer.query.dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (None, "cannot be read as safetensors"),
        ({"q": torch.zeros(2, 4, 8)}, "must hold the tensors q, k and v, not q"),
        ({"q": torch.zeros(3, 4, 8), "k": torch.zeros(2, 4, 8), "v": torch.zeros(2, 4, 8)}, r"not q \[3, 4, 8\]"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor] | None, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("not tensors") if tensors is None else save_file(tensors, path)
    with pytest.raises(UsageError, match=message):
        load_layer(path)


def test_the_facts_tell_models_and_texts_apart() -> None:
    model, other = tiny("llama", layers=1), tiny("llama", layers=1)
    first = describe(model, "some/folder", "text", [1, 2, 3])
    assert first == describe(other, "some/folder", "text", [1, 2, 3])
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1
    changed = describe(other, "some/folder", "text", [1, 2, 4])
    assert {name for name in first if first[name] != changed[name]} == {"weights_sha256", "tokens", "tokens_sha256"}
    assert first["model"] == "folder" and first["positions"] == "3"
