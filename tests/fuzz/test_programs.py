"""A fixed sample of programs, of which none may differ from what it computes uncompiled."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule

from s2o_compile.ops import S2OConfig
from s2o_compile.passes import Decision, rewrite

from . import check, programs
from .choices import Choices, shrink
from .drawing import draw_program

SAMPLE = [0, pytest.param(40, marks=pytest.mark.slow)]


@pytest.mark.parametrize("first", SAMPLE)
def test_programs_compute_the_same(first: int) -> None:
    tried = [programs.attempt(seed, []) for seed in range(first, first + 40)]
    assert [x.script for x in tried if x.is_fault] == []
    assert sum("rewritten" in x.counts for x in tried) >= 12


def test_programs_repeat_from_their_seed() -> None:
    assert draw_program(Choices(7)) == draw_program(Choices(7))
    made = Choices(7)
    draw_program(made)
    assert draw_program(Choices(given=made.made)) == draw_program(Choices(7))


def test_failures_shrink_to_what_matters() -> None:
    """The simplest program that has a feature has little else."""

    def has_cast(choices: Choices) -> bool:
        return "cast: != 0" in draw_program(choices).features

    made = next(x for x in (Choices(seed) for seed in range(1000)) if has_cast(x)).made
    least = draw_program(Choices(given=shrink(made, has_cast, seconds=20)))
    assert "cast: != 0" in least.features and len(least.features) <= 4


def test_a_fault_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewriting that loses the causal mask fails soon, and is reported as a script with little else in it."""

    def losing(module: GraphModule, config: S2OConfig, fuse_dense: bool) -> list[Decision]:
        decisions = rewrite(module, config, fuse_dense=fuse_dense)
        for node in module.graph.nodes:
            if node.target is torch.ops.s2o.attention.default:
                node.kwargs = dict(node.kwargs, is_causal=False)
        module.recompile()
        return decisions

    monkeypatch.setattr(check, "rewrite", losing)
    monkeypatch.setattr(programs, "SHRINKING", 10.0)
    tried = next(x for x in (programs.attempt(seed, []) for seed in range(100)) if x.is_fault)
    assert tried.kind == "outputs: values"
    assert "torch.compile" in tried.script and len(tried.features) <= 4
