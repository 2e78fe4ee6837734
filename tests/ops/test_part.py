"""Calls of a part of the queries choose as the call of all of them, given its samples, and all keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2o_compile.ops import AttentionResult, cpu
from s2o_compile.ops.kernels import pipeline, plan
from s2o_compile.ops.memory import limited_workspace
from s2o_compile.ops.part import Part, SampledQueries
from s2o_compile.ops.rule.channels import sampling_step
from s2o_compile.ops.visibility import Visibility

from .comparison import largest_difference
from .settings import config_of

LENGTH, CUT = 256, 96
GPU = "cuda" if torch.cuda.is_available() else "cpu"
SETTINGS: dict[str, dict[str, Any]] = {
    "half of the channels": {"channels": 16, "radius": 0.0},
    "few channels": {"channels": 5, "radius": 0.0},
    "merged": {"channels": 20, "radius": 3.0, "merge_length": LENGTH},
    "outputs": {"channels": 16, "radius": 0.0, "measure": "output"},
}


@pytest.mark.parametrize("implementation", [cpu, pipeline])
@pytest.mark.parametrize("name", SETTINGS)
def test_parts_are_those_of_the_whole(name: str, implementation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 2 if name == "outputs" else 1
    # Of two batch entries, each is a launch of its own.
    monkeypatch.setattr(pipeline, "MAX_PROGRAMS", 1)
    torch.manual_seed(3)
    device = GPU if implementation is pipeline else "cpu"
    query, key, value = (torch.randn(batch, heads, LENGTH, 32, device=device) for heads in (2, 1, 1))
    config = config_of(threshold=0.1, near_keys=0, **SETTINGS[name])
    padding = (torch.arange(LENGTH).expand(batch, -1) > 5 * torch.arange(1, batch + 1)[:, None]).to(device)
    attend: Callable[..., AttentionResult] = implementation.sparse_attention

    def attended(rows: slice, part: Part | None) -> AttentionResult:
        offset = rows.start or 0
        terms = Visibility(is_causal=True, causal_offset=offset, key_padding=padding)
        return attend(query[:, :, rows], key, value, terms, 32**-0.5, 0.0, config, part)

    mask = Visibility(is_causal=True, key_padding=padding)
    of_all = Part(query.unflatten(1, (1, 2)), SampledQueries.of(query, 1, mask))
    whole, rows = attended(slice(None), None).output, [slice(0, CUT), slice(CUT, LENGTH)]

    def difference(part: Part | None) -> float:
        return largest_difference(torch.cat([attended(some, part).output for some in rows], 2), whole)

    # Another choice shows; products round by how many are computed at once on some CPUs.
    assert difference(of_all) < 1e-6 < 1e-3 < difference(None)


@pytest.mark.parametrize(("implementation", "measure"), [(cpu, "mass"), (pipeline, "mass"), (pipeline, "output")])
def test_values_may_arrive_while_keys_are_ranked(
    implementation: Any, measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    device = GPU if implementation is pipeline else "cpu"
    query, key, value = (torch.randn(1, heads, LENGTH, 16, device=device) for heads in (2, 1, 1))
    # Small enough that lists are made and visited in several runs.
    config, steps = config_of(threshold=0.1, near_keys=0, channels=None, radius=0.0, measure=measure), []
    attend = functools.partial(implementation.sparse_attention, scale=0.25, softcap=0.0, config=config)
    with limited_workspace(2**11):
        want = attend(query, key, value, Visibility(True)).output
    travelling = torch.full_like(value, torch.nan)
    run = plan.Launch.run

    def noted(launch: plan.Launch, *arguments: Any) -> None:
        steps.append(launch.kernel.__name__)
        run(launch, *arguments)

    def arrive() -> None:
        steps.append("arrive")
        travelling.copy_(value)

    monkeypatch.setattr(plan.Launch, "run", noted)
    with limited_workspace(2**11):
        got = attend(query, key, travelling, Visibility(True), part=Part(arrive=arrive)).output
    assert torch.equal(got, want)
    if implementation is pipeline and measure == "mass":
        before, after = steps[: steps.index("arrive")], steps[steps.index("arrive") + 1 :]
        assert "importance_kernel" in before and after[0] == "attend_kernel"
        assert "attend_kernel" not in before and "importance_kernel" in after


def test_values_that_are_copied_have_arrived() -> None:
    torch.manual_seed(6)
    query, key, value = (torch.randn(1, 1, LENGTH, 16, device=GPU) for _ in "qkv")
    travelling = torch.full_like(value, torch.nan).mT.contiguous().mT
    attend = functools.partial(pipeline.sparse_attention, scale=0.25, softcap=0.0, config=config_of(radius=0.0))
    part = Part(arrive=lambda: travelling.copy_(value))
    got = attend(query, key, travelling, Visibility(True), part=part).output
    assert torch.equal(got, attend(query, key, value, Visibility(True)).output)


def test_a_plan_of_what_computes_waits_first() -> None:
    """As it cannot be recorded, nothing says where a tensor is first read."""
    x, result = torch.zeros(3), torch.empty(3)

    def double(tensors: plan.Tensors, device: torch.device) -> None:
        tensors[1].copy_(2 * tensors[0])

    plan.planned(double, (x, result), x.device, late=plan.Late(0, lambda: x.fill_(1)))
    assert result.tolist() == [2, 2, 2]


def test_a_sample_is_its_own_sample() -> None:
    for heads in (1, 3, 8, 71):
        for length in (*range(1, 300), *range(2000, 9000, 7), 131072, 10**6 + 1):
            sampled = -(-length // sampling_step(heads * length))
            assert sampling_step(heads * sampled) == 1
