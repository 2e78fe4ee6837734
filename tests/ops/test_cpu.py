"""The CPU implementation against the specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from s2o_compile.ops import AttentionResult, Ranking, S2OConfig, cpu
from s2o_compile.ops.cpu import attend, flash, rank
from s2o_compile.ops.memory import limited_workspace
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from .comparison import allowed_error, assert_same, dense, largest_difference, seen
from .strategies import Call, calls, configs

DOCUMENTS = (torch.arange(700) // 300)[None]


@settings(max_examples=examples(60))
@given(calls())
def test_agrees_with_the_reference(call: Call) -> None:
    tensors, visibility = call.tensors(torch.float64), call.visibility()
    scale = call.channels**-0.5
    with limited_workspace(call.workspace):
        got = cpu.sparse_attention(*tensors, visibility, scale, call.softcap, call.config)
    want = reference_attention(*tensors, visibility, softcap=call.softcap, config=call.config)
    assert_same(got, want, 1e-9)


@settings(max_examples=examples(60))
@given(calls(settings=configs(thresholds=(0.0,))))
def test_threshold_zero_is_as_exact_as_sdpa(call: Call) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = call.tensors(dtype)
        mask = seen(*tensors[:2], call.visibility())
        with limited_workspace(call.workspace):
            output = torch.ops.s2o.attention(*tensors, **call.arguments(), **call.config.arguments())
        assert output.dtype == dtype
        want = dense(*tensors, mask, softcap=call.softcap, sinks=call.sinks())
        assert largest_difference(output, want) <= allowed_error(*tensors, mask, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "visibility",
    [
        Visibility(True),
        Visibility(True, window=400),
        Visibility(True, query_documents=DOCUMENTS, key_documents=DOCUMENTS),
    ],
    ids=["causal", "window", "documents"],
)
def test_low_precision_ranking_finds_the_same_keys_but_for_those_at_the_threshold(
    visibility: Visibility, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 700, 32) * 2, torch.randn(1, 2, 700, 32), torch.randn(1, 2, 700, 32)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    config = S2OConfig(threshold=1e-2, min_length=0, last_queries=0)
    terms = visibility._asdict()
    got = AttentionResult(*torch.ops.s2o.attention_stats(query, key, value, **terms, **config.arguments()))
    want = reference_attention(query.double(), key.double(), value.double(), visibility, config=config)
    exact = dense(query, key, value, seen(query, key, visibility))
    outputs = (got.output, want.output, exact.to(dtype))
    error, specified, rounding = ((x.double() - exact).square().sum() for x in outputs)
    assert error < 1.1 * specified + rounding + 1e-4
    assert 0.9 < got.visited.sum() / want.visited.sum() < 1.1


def test_works_through_many_runs_of_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank, "_SCORES_OF_A_RUN", 2**12)
    monkeypatch.setattr(rank, "_SCORES_AT_ONCE", 2**10)
    monkeypatch.setattr(attend, "_GATHERED", 2**8)
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, 2, 500, 16, dtype=torch.float64) for _ in "qkv")
    for config in (
        S2OConfig(threshold=1e-2, last_queries=50),
        S2OConfig.paper().with_ranking(segment=64, pool=64),
    ):
        for visibility in (Visibility(True), Visibility(True, window=170), Visibility(False, 20, window=170)):
            with limited_workspace(2**12):
                got = cpu.sparse_attention(query, key, value, visibility, 0.25, 0.0, config)
            assert_same(got, reference_attention(query, key, value, visibility, config=config), 1e-9)


@pytest.mark.parametrize(
    "config",
    [
        S2OConfig.paper().with_ranking(segment=64, pool=64),
        S2OConfig(threshold=1e-2, ranking=Ranking(rule="means")),
        S2OConfig(threshold=1e-2, ranking=Ranking(pool=2, channels=8, lists="head", measure="output")),
    ],
    ids=["paper", "means", "other"],
)
@pytest.mark.parametrize("visibility", [Visibility(True), Visibility(True, window=100), Visibility()])
def test_all_tensors_are_on_the_device_of_the_inputs(config: S2OConfig, visibility: Visibility) -> None:
    """As on a GPU, for rules without kernels: a tensor on the default device would not mix with the others."""
    torch.manual_seed(2)
    query, key, value = (torch.randn(1, heads, 300, 16) for heads in (4, 2, 2))
    want = cpu.sparse_attention(query, key, value, visibility, 0.25, 0.0, config)
    with torch.device("meta"):
        got = cpu.sparse_attention(query, key, value, visibility, 0.25, 0.0, config)
    assert_same(got, want, 0.0)


def test_only_a_cpu_runs_the_kernel_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "_fused", None)
    query, key, value = (torch.randn(shape, device="meta") for shape in ((5, 2, 32, 16), (5, 70, 16), (5, 70, 24)))
    output, lse = flash.attend(query, key, value, key.new_zeros(5, 1, 1, 70), 0.0, finite=True)
    assert output.shape == (5, 2, 32, 24)
    assert lse.shape == (5, 2, 32)
