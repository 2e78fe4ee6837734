"""Export: programs with the operator in them, and packages of AOTInductor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import Dim
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile import Ranking, S2OConfig

from ..passes.capture import EXACT
from ..passes.models import padding, tiny, tokens

LENGTHS = {1: Dim.AUTO}


class Logits(torch.nn.Module):
    """A language model as a function of token ids and their padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def operators(program: torch.export.ExportedProgram) -> int:
    return sum(node.target is torch.ops.s2o.attention.default for node in program.graph.nodes)


@torch.no_grad()
def assert_equals_dense(program: Any, model: Logits, lengths: tuple[int, ...]) -> None:
    for length in lengths:
        inputs = (tokens(length), padding(length, "left"))
        want, got = model(*inputs), program(*inputs)
        torch.testing.assert_close(got[:, 9:], want[:, 9:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("strict", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_saved_program_runs_at_other_lengths(strict: bool, tmp_path: Path) -> None:
    model = Logits(tiny("llama"))
    inputs = (tokens(40), padding(40, "left"))
    program = s2o_compile.export(model, inputs, dynamic_shapes=(LENGTHS, LENGTHS), config=EXACT, strict=strict)
    assert operators(program) == 2
    torch.export.save(program, tmp_path / "model.pt2")
    assert_equals_dense(torch.export.load(tmp_path / "model.pt2").module(), model, (40, 20, 77))


@pytest.mark.parametrize("attention", ["sdpa", "eager", "s2o"])
def test_masks_and_scores_are_gone(attention: str) -> None:
    model = Logits(tiny("llama", layers=1))
    model.model.set_attn_implementation(attention)
    program = s2o_compile.export(model, (tokens(40), padding(40, "left")), config=EXACT)
    assert operators(program) == 1
    assert_equals_dense(program.module(), model, (40,))
    values = (node.meta.get("val") for node in program.graph.nodes)
    assert not any(isinstance(value, torch.Tensor) and value.shape[-2:] == (40, 40) for value in values)


class WithNumber(torch.nn.Module):
    """Attention with a mask that is made from a number, which export stores as a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keep = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril()
        mask = torch.where(keep, torch.tensor(0.0, dtype=x.dtype), torch.finfo(x.dtype).min)
        return scaled_dot_product_attention(x, x, x, attn_mask=mask)


@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_made_from_a_number(strict: bool) -> None:
    model, x = WithNumber(), torch.randn(1, 2, 40, 8)
    program = s2o_compile.export(model, (x,), config=EXACT, strict=strict)
    assert operators(program) == 1
    torch.testing.assert_close(program.module()(x), model(x))


class Scaled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ x.mT * x.shape[2] ** -0.5 / 3).softmax(-1) @ x


class ScaledQuery(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(x * x.shape[2] ** -0.5, x, x, scale=1 / 3)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("model", [Scaled(), ScaledQuery()], ids=["scores", "query"])
def test_a_scale_computed_from_the_length(model: torch.nn.Module, strict: bool) -> None:
    args, shapes = (torch.randn(1, 2, 40, 8),), ({2: Dim.AUTO},)
    program = s2o_compile.export(model, args, dynamic_shapes=shapes, config=EXACT, strict=strict)
    assert operators(program) == 1
    for length in (40, 20, 77):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(program.module()(x), model(x))


def test_settings_are_in_the_program() -> None:
    program = s2o_compile.export(Logits(tiny("llama")), (tokens(40),), config=S2OConfig(threshold=0.25, min_length=0))
    nodes = program.graph.find_nodes(op="call_function", target=torch.ops.s2o.attention.default)
    assert [node.kwargs["threshold"] for node in nodes] == [0.25, 0.25]


@torch.no_grad()
def test_settings_are_in_a_saved_program(tmp_path: Path) -> None:
    config = S2OConfig(0.25, min_length=0, last_queries=3, ranking=Ranking(pool=4, lists="head", near_keys=0))
    ids = tokens(40)
    program = s2o_compile.export(Logits(tiny("llama", layers=1)), (ids,), config=config)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2")
    (node,) = loaded.graph.find_nodes(op="call_function", target=torch.ops.s2o.attention.default)
    assert S2OConfig.from_arguments(**{name: node.kwargs[name] for name in config.arguments()}) == config
    with torch.no_grad():
        assert torch.equal(loaded.module()(ids), program.module()(ids))


def test_nothing_to_rewrite() -> None:
    with pytest.raises(ValueError, match=r"Logits becomes sparse; .*40 queries over 40 keys are too few to gain"):
        s2o_compile.export(Logits(tiny("llama")), (tokens(40),))
    with pytest.raises(ValueError, match="Linear becomes sparse; no attention was found"):
        s2o_compile.export(torch.nn.Linear(2, 2), (torch.zeros(2),))


def test_a_package(tmp_path: Path) -> None:
    model = Logits(tiny("llama", layers=1))
    inputs = (tokens(40), padding(40, "left"))
    program = s2o_compile.export(model, inputs, dynamic_shapes=(LENGTHS, LENGTHS), config=EXACT)
    # Headers that are compiled beforehand save time from the third package on.
    options = {"aot_inductor.precompile_headers": False}
    path = str(tmp_path / "model.pt2")
    package = torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
    assert_equals_dense(torch._inductor.aoti_load_package(package), model, (40, 20, 77))


@pytest.mark.slow
def test_a_package_with_a_scale_computed_from_the_length(tmp_path: Path) -> None:
    model = Scaled()
    program = s2o_compile.export(model, (torch.randn(1, 2, 40, 8),), dynamic_shapes=({2: Dim.AUTO},), config=EXACT)
    assert operators(program) == 1
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for length in (40, 2, 77, 500):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(loaded(x), model(x))
