"""The backend together with what else people put around a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import s2o_compile

from ..passes.capture import EXACT, Capture, inputs
from ..passes.models import padding, tiny, tokens


def run(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    return model(ids, attention_mask=padding(ids.shape[1], "left")).logits[:, 9:]


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool) -> None:
    dense, model, ids = tiny("llama", layers=1), tiny("llama", layers=1), tokens(40)
    captured = Capture()
    if compiled:
        sparse = torch.compile(model, backend=captured)
    else:
        model.set_attn_implementation("s2o")
        s2o_compile.configure(model, EXACT)
        sparse = model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = run(dense, ids), run(sparse, ids)
    assert got.dtype == want.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.03 * want.abs().max()
    assert len(captured.operators()) == (1 if compiled else 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_inference_mode(dtype: torch.dtype) -> None:
    model, ids = tiny("llama", layers=1).to(dtype), tokens(40)
    captured = Capture()
    compiled = torch.compile(model, backend=captured)
    with torch.inference_mode():
        want, got = run(model, ids), run(compiled, ids)
    assert got.dtype == dtype and len(captured.operators()) == 1
    assert (got - want).abs().max() < 0.03 * want.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_threads_have_their_own_settings(compiled: bool) -> None:
    """Two models at once, of which each computes what it computes alone."""
    ids = tokens(80)
    models = []
    for threshold in (0.0, 0.3):
        model, config = tiny("llama", layers=1), dataclasses.replace(EXACT, threshold=threshold)
        if compiled:
            models.append(torch.compile(model, backend=Capture(config)))
        else:
            model.set_attn_implementation("s2o")
            s2o_compile.configure(model, config)
            models.append(model)
    start = Barrier(2)

    def repeat(model: Callable[..., Any]) -> list[torch.Tensor]:
        start.wait()
        with torch.no_grad():
            return [run(model, ids) for _ in range(8)]

    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(repeat, models))
    with torch.no_grad():
        alone = [run(model, ids) for model in models]
    assert not torch.equal(*alone)
    for results, want in zip(together, alone, strict=True):
        assert all(torch.equal(result, want) for result in results)


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_reach_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patches: dict[str, Any] = {}

    def compile_fx(module: torch.fx.GraphModule, inputs: Any, config_patches: dict[str, Any]) -> Any:
        patches.update(config_patches)
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    with torch.no_grad():
        torch.compile(lambda *x: sdpa(*x, is_causal=True), backend="s2o", mode=mode)(*inputs())
    assert patches == torch._inductor.list_mode_options(mode) != {}


@pytest.mark.parametrize("settings", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_quantised_linears(settings: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = tiny("llama"), tokens(40)
    plain = model.model.layers[0].self_attn.q_proj.weight.data.clone()
    quantization.quantize_(model, getattr(quantization, settings)())
    assert not torch.equal(model.model.layers[0].self_attn.q_proj.weight.dequantize(), plain)
    captured = Capture()
    compiled = torch.compile(model, backend=captured, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, ids), run(model, ids), atol=1e-4, rtol=1e-4)
    assert len(captured.operators()) == 2


@pytest.mark.usefixtures("process_group")
def test_fsdp() -> None:
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dense, model, ids = tiny("llama"), tiny("llama"), tokens(40)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fsdp.fully_shard(layer, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    captured = Capture()
    compiled = torch.compile(model, backend=captured)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, ids), run(dense, ids), atol=1e-4, rtol=1e-4)
    assert len(captured.operators()) == 2
