"""The Triton implementation against the specification: interpreted on a CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings

from s2o_compile.ops import AttentionResult, Ranking, S2OConfig
from s2o_compile.ops.kernels import pipeline, quantise, tiling
from s2o_compile.ops.kernels.plan import plan_of
from s2o_compile.ops.memory import limited_workspace
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.rule.sinks import add_sinks
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from .comparison import (
    allowed_error,
    assert_same,
    dense,
    largest_difference,
    sdpa,
    seen,
    share_at_the_threshold,
)
from .strategies import Call, calls, configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONGEST = 200 if DEVICE == "cuda" else 130
# The interpreter multiplies the bits of bfloat16 as integers.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# Each example compiles kernels of its own on a GPU.
EXAMPLES = examples(8 if DEVICE == "cuda" else 12)
SLOW = [pytest.mark.slow] * (DEVICE == "cpu")
"""The interpreter takes long for cases much like others."""
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


def run(call: Call, tensors: tuple[torch.Tensor, ...]) -> AttentionResult:
    """What the operator makes of the kernels' result."""
    visibility, sinks = call.visibility(DEVICE), call.sinks(DEVICE)
    with limited_workspace(call.workspace):
        result = pipeline.sparse_attention(*tensors, visibility, call.channels**-0.5, call.softcap, call.config)
    return result if sinks is None else add_sinks(result, sinks)


@pytest.mark.hypothesis
def test_agrees_with_the_reference() -> None:
    undecided = []

    @settings(max_examples=EXAMPLES, phases=PHASES)
    @given(calls(longest=LONGEST, settings=configs(by_kernels=True)))
    def agrees(call: Call) -> None:
        undecided.append(compare(call))

    agrees()
    assert sum(undecided) / len(undecided) < 0.01


def specification(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Visibility,
    config: S2OConfig,
    **arguments: Any,
) -> Callable[[float], AttentionResult]:
    """What the reference gives in float64, by threshold."""

    def specified(threshold: float) -> AttentionResult:
        tensors = (x.double() for x in (query, key, value))
        return reference_attention(*tensors, terms, config=replace(config, threshold=threshold), **arguments)

    return specified


def compare(call: Call) -> float:
    """A call of the kernels with the reference: the share of tiles with a key too close to the threshold to decide."""
    tensors, terms = call.tensors(torch.float32, DEVICE), call.visibility(DEVICE)

    specified = specification(*tensors, terms, call.config, softcap=call.softcap, sinks=call.sinks(DEVICE))
    return share_at_the_threshold(run(call, tensors), specified, call.config.threshold, call.config.ranking.tile, 1e-4)


@pytest.mark.parametrize("keys, undecided", [(100, 0), (120, 1), (128, 0)])
def test_keys_at_the_threshold_are_visited_or_not(keys: int, undecided: int) -> None:
    """Of 120 keys that are all alike each has the importance 1 / 120, which reaches that threshold or does not."""
    query, key = torch.zeros(1, 1, 32, 16, device=DEVICE), torch.ones(1, 1, 128, 16, device=DEVICE)
    value, terms = torch.randn(1, 1, 128, 16, device=DEVICE), Visibility(mask=torch.arange(128, device=DEVICE) < 120)
    terms = terms._replace(mask=terms.mask[None, None, None])
    config = S2OConfig(threshold=1 / keys, ranking=Ranking(rule="dropped", sample=1, near_keys=0))
    got = pipeline.sparse_attention(query, key, value, terms, 0.25, 0.0, config)
    share = share_at_the_threshold(got, specification(query, key, value, terms, config), config.threshold, 32, 1e-4)
    assert share <= undecided


@pytest.mark.parametrize("harm", ["output", "lse", "visited", "all", "nan"])
def test_a_tile_that_is_wrong_is_found(harm: str) -> None:
    torch.manual_seed(12)
    tensors, config = (
        torch.randn(3, 1, 2, 130, 16, device=DEVICE),
        S2OConfig(threshold=0.02, ranking=Ranking(near_keys=0)),
    )
    got = pipeline.sparse_attention(*tensors, Visibility(True), 0.25, 0.0, config)
    specified = specification(*tensors, Visibility(True), config)
    assert share_at_the_threshold(got, specified, config.threshold, 32, 1e-4) == 0
    if harm in ("output", "all", "nan"):
        got.output[0, 1, 96:128] += torch.nan if harm == "nan" else 0.02
    if harm in ("lse", "all"):
        got.lse[0, 1, 100] += 0.02
    if harm in ("visited", "all"):
        got.visited[0, 1, 3] += 64 * 32
    with pytest.raises(AssertionError, match=r"\[0, 1, 3\]"):
        share_at_the_threshold(got, specified, config.threshold, 32, 1e-4)


@settings(max_examples=EXAMPLES // 2, phases=PHASES)
@given(calls(longest=LONGEST, settings=configs(thresholds=(0.0,), by_kernels=True)))
def test_threshold_zero_is_as_exact_as_sdpa(call: Call) -> None:
    for dtype in DTYPES:
        tensors = call.tensors(dtype, DEVICE)
        mask = seen(*tensors[:2], call.visibility(DEVICE))
        want = dense(*tensors, mask, softcap=call.softcap, sinks=call.sinks(DEVICE))
        assert largest_difference(run(call, tensors).output, want) <= allowed_error(*tensors, mask, want)


@pytest.mark.parametrize("channels, value_channels", [(16, 16), (80, 96), (256, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_dimensions(channels: int, value_channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(channels)
    query = torch.randn(1, 2, 90, channels, device=DEVICE, dtype=dtype)
    key = torch.randn(1, 1, 100, channels, device=DEVICE, dtype=dtype)
    value = torch.randn(1, 1, 100, value_channels, device=DEVICE, dtype=dtype)
    config = S2OConfig(threshold=0, ranking=Ranking(near_keys=0))
    got = pipeline.sparse_attention(query, key, value, Visibility(True, 10), channels**-0.5, 0.0, config).output
    mask = torch.ones(90, 100, dtype=torch.bool, device=DEVICE).tril(10)
    want = dense(query, key, value, mask)
    allowed = 1e-5 if dtype == torch.float32 else 2 * largest_difference(sdpa(query, key, value, mask), want)
    assert largest_difference(got, want) <= allowed


def test_bounded_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "CHUNK", 128)
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, 2, 200, 16, device=DEVICE) for _ in "qkv")
    config = S2OConfig(threshold=1e-2, last_queries=20, ranking=Ranking(near_keys=0))
    for visibility in (Visibility(True), Visibility(True, window=100)):
        with limited_workspace(2**12):
            got = pipeline.sparse_attention(query, key, value, visibility, 0.25, 0.0, config)
        want = reference_attention(query.double(), key.double(), value.double(), visibility, config=config)
        assert_same(got, want, 1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_more_batch_entries_than_a_launch_has_programs(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(13)
    query, key, value = (torch.randn(3, heads, 70, 16, device=DEVICE) for heads in (2, 1, 1))
    documents = torch.arange(70, device=DEVICE) // torch.tensor([[20], [30], [40]], device=DEVICE)
    mask = documents[:, None, :, None] + documents[:, None, None] > 0
    terms = Visibility(
        mask=mask[:1] if shared else mask,
        key_padding=None if shared else documents != 1,
        query_documents=None if shared else documents // 2,
        key_documents=None if shared else documents // 2,
    )
    config = S2OConfig(threshold=0.02, ranking=Ranking(near_keys=0))
    want = pipeline.sparse_attention(query, key, value, terms, 0.25, 0.0, config)
    plan_of.cache_clear()
    monkeypatch.setattr(pipeline, "MAX_PROGRAMS", 2)
    assert_same(pipeline.sparse_attention(query, key, value, terms, 0.25, 0.0, config), want, 0.0)


@pytest.mark.gpu
def test_many_batch_entries() -> None:
    """Such as the windows of an image: a launch has no more than 65,535 programs along most axes."""
    query, key, value = (torch.randn(35_000, 2, 40, 16, device="cuda", dtype=torch.bfloat16) for _ in "qkv")
    got = torch.ops.s2o.attention(query, key, value, min_length=0, threshold=0.0)
    want = sdpa(query, key, value, torch.ones(40, 40, dtype=torch.bool, device="cuda"))
    assert largest_difference(got, want) < 0.05


BY_HEAD = S2OConfig(threshold=1e-2, ranking=Ranking(pool=2, lists="head"))
MERGED = S2OConfig(threshold=1e-2, ranking=Ranking(merge_length=0))


@pytest.mark.parametrize(
    "config, half, heads, groups",
    [
        (MERGED, True, 2, 2),
        (MERGED, True, 6, 1),
        (S2OConfig(threshold=1e-2), True, 6, 1),
        (BY_HEAD, False, 2, 2),
        pytest.param(MERGED, False, 2, 2, marks=SLOW),
        pytest.param(S2OConfig(threshold=1e-2), False, 2, 2, marks=SLOW),
        pytest.param(BY_HEAD, True, 2, 2, marks=SLOW),
        pytest.param(BY_HEAD, True, 6, 1, marks=SLOW),
    ],
)
def test_ranking_in_float8_errs_no_more(
    config: S2OConfig, half: bool, heads: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With keys that have large biases of single channels, which float8 alone could not represent.

    Six heads of a group make 192 guides, which are multiplied in two parts.
    """
    torch.manual_seed(9)
    length = 300 if DEVICE == "cuda" else 200
    bias = 30 * (torch.arange(32, device=DEVICE) % 8 == 0)
    query, key, value = (torch.randn(1, n, length, 32, device=DEVICE) * 2 for n in (heads, groups, groups))
    monkeypatch.setattr(quantise, "sums_in_half", lambda operands, *rest: half and operands.are_quantised)
    tensors = [x.half() for x in (query, key + bias, value)]
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    want = dense(*tensors, mask)
    visited, error = [], []
    for is_float8 in (False, True):
        monkeypatch.setattr(quantise, "ranks_in_float8", lambda *arguments, answer=is_float8: answer)
        plan_of.cache_clear()
        result = pipeline.sparse_attention(*tensors, Visibility(True), 32**-0.5, 0.0, config)
        visited.append(result.visited.sum().item())
        error.append((result.output.double() - want).square().sum().item())
    assert visited[1] == pytest.approx(visited[0], rel=0.05)
    assert error[1] <= 1.5 * error[0]
    assert error != [0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [S2OConfig(threshold=1e-3), S2OConfig(threshold=1e-3, ranking=Ranking(pool=4, lists="head")), S2OConfig.paper()],
)
def test_long_calls(dtype: torch.dtype, config: S2OConfig) -> None:
    """At lengths that the reference does not reach: threshold 0 is dense, a threshold errs little."""
    torch.manual_seed(4)
    query = torch.randn(1, 8, 5000, 128, device="cuda", dtype=dtype) * 2
    key, value = (torch.randn(1, 2, 5000, 128, device="cuda", dtype=dtype) for _ in "kv")
    mask = torch.ones(5000, 5000, dtype=torch.bool, device="cuda").tril()
    want = dense(query, key, value, mask)
    exact = {**config.arguments(), "threshold": 0.0, "min_length": 0}
    output = torch.ops.s2o.attention(query, key, value, is_causal=True, **exact)
    allowed = 1e-5 if dtype == torch.float32 else 2 * largest_difference(sdpa(query, key, value, mask), want)
    assert largest_difference(output, want) <= allowed
    sparse = torch.ops.s2o.attention(query, key, value, is_causal=True, **{**exact, "threshold": config.threshold})
    assert (sparse.double() - want).square().sum() < 0.5 * want.square().sum()
    again = torch.ops.s2o.attention(query, key, value, is_causal=True, **{**exact, "threshold": config.threshold})
    assert torch.equal(sparse, again)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """Strides that put the last head past 2^31 elements."""
    torch.manual_seed(5)
    storage = torch.zeros(2**31 + 2**22, device="cuda", dtype=torch.bfloat16)
    shape, strides = (1, 2, 2000, 64), (0, 2**31, 64, 1)
    query, key, value = (storage.as_strided(shape, strides, n * 2**19).normal_() for n in range(3))
    config = {"threshold": 0.0, "min_length": 0}
    got = torch.ops.s2o.attention(query, key, value, is_causal=True, **config)
    mask = torch.ones(2000, 2000, dtype=torch.bool, device="cuda").tril()
    want = dense(query, key, value, mask)
    allowed = 2 * largest_difference(sdpa(query.contiguous(), key.contiguous(), value.contiguous(), mask), want)
    assert largest_difference(got, want) <= allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic: bool) -> None:
    """Inductor calls the operator, and the same numbers come out."""
    torch.manual_seed(6)
    query, key, value = (torch.randn(1, 4, 1000, 64, device="cuda", dtype=torch.bfloat16) for _ in "qkv")

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.s2o.attention(query * 2, key, value, is_causal=True, min_length=0, threshold=1e-3) + 1

    got = torch.compile(model, fullgraph=True, dynamic=dynamic)(query, key, value)
    assert torch.equal(got, model(query, key, value))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("rule, threshold", [("dropped", 0.0), ("dropped", 1e-2), ("sampled", 1e-2)])
@pytest.mark.parametrize(
    "gap, dtype",
    [
        (25, torch.float16),
        (100, torch.float32),
        pytest.param(25, torch.float32, marks=SLOW),
        pytest.param(100, torch.float16, marks=SLOW),
        *((gap, torch.bfloat16) for gap in (25, 100) if DEVICE == "cuda"),
    ],
)
def test_far_larger_logits_late_in_a_list(
    gap: int, dtype: torch.dtype, rule: str, threshold: float, is_causal: bool
) -> None:
    """Weights in units of the first logits would overflow in the dtype: but for one block, logits are near `-gap`.

    Those of float16 overflow from a gap of 11 on, and those of float32 from 88.
    """
    torch.manual_seed(4)
    query, key, value = (torch.randn(1, 1, 320, 16, device=DEVICE, dtype=dtype) for _ in "qkv")
    query[..., 0], key[..., 0] = gap / 5, -20
    key[:, :, 64:128, 0] = 0
    config = S2OConfig(threshold=threshold, ranking=Ranking(near_keys=0, rule=rule))
    got = pipeline.sparse_attention(query, key, value, Visibility(is_causal), 0.25, 0.0, config).output
    mask = torch.ones(320, 320, dtype=torch.bool, device=DEVICE)
    want = dense(query, key, value, mask.tril() if is_causal else mask)
    assert largest_difference(got, want) <= (1e-4 if dtype == torch.float32 else 0.02)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, pytest.param(-torch.inf, marks=SLOW)])
@pytest.mark.parametrize("which, rule", [("query", "dropped"), ("key", "sampled"), ("value", "sampled")])
def test_bad_numbers_spread_no_further_than_in_dense_attention(bad: float, which: str, rule: str) -> None:
    torch.manual_seed(7)
    tensors = {name: torch.randn(1, 2, 190, 16, device=DEVICE) for name in ("query", "key", "value")}
    config = S2OConfig(threshold=1e-2, ranking=Ranking(near_keys=0, lists="head", rule=rule))
    tensors[which][0, 1, 90, 3] = bad
    output = pipeline.sparse_attention(*tensors.values(), Visibility(True), 0.25, 0.0, config).output
    assert output[0, 0].isfinite().all()
    tile_end = 96
    assert output[0, 1, :64].isfinite().all()
    if which == "query":
        assert output[0, 1, tile_end:].isfinite().all()


@pytest.mark.parametrize("threshold, rule", [(0.0, "sampled"), (1e-2, "sampled"), (1e-2, "dropped")])
@pytest.mark.parametrize("term", ["mask", "padding"])
def test_what_hidden_keys_hold_does_not_matter(term: str, threshold: float, rule: str) -> None:
    """Neither NaN, which no maximum passes on, nor infinity, which each does."""
    torch.manual_seed(8)
    query, key, value = (torch.randn(1, 2, 120, 16, device=DEVICE) for _ in "qkv")
    visible = torch.rand(1, 120, device=DEVICE) < 0.5
    terms = Visibility(mask=visible[None, None]) if term == "mask" else Visibility(key_padding=visible)
    config = S2OConfig(threshold=threshold, ranking=Ranking(rule=rule, channels=8, measure="output", near_keys=0))
    if term == "mask":
        config = config.with_ranking(channels=None)  # What a mask hides has its say in which channels are strongest.
    want = pipeline.sparse_attention(query, key, value, terms, 0.25, 0.0, config)
    hidden = ~visible[0]
    bad = torch.tensor([torch.nan, torch.inf], device=DEVICE)[torch.arange(int(hidden.sum()), device=DEVICE) % 2, None]
    key[:, :, hidden], value[:, :, hidden] = bad, bad
    got = pipeline.sparse_attention(query, key, value, terms, 0.25, 0.0, config)
    assert_same(got, want, 0.0)
