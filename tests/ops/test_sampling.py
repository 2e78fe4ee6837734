"""The sampled tail: evenly spread draws, unbiased sums, an error that the threshold bounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.rule.sampling import draws
from s2o_compile.ops.visibility import Visibility

from .comparison import dense


@given(st.integers(0, 2**20), st.integers(0, 2**31 - 5000), st.sampled_from([0.5, 0.1, 0.02]))
def test_draws_are_evenly_spread_along_the_keys(segment: int, first: int, share: float) -> None:
    drawn = draws(torch.arange(first, first + 5000), torch.tensor(segment))
    assert drawn.dtype == torch.float32 and drawn.min() > 0 and drawn.max() < 1
    assert abs(int((drawn <= share).sum()) - 5000 * share) <= 5


def test_draws_are_evenly_spread_along_the_segments() -> None:
    chosen = draws(torch.arange(4096), torch.arange(64)[:, None]) < 1 / 16
    assert (chosen.sum(0) - 4).abs().max() <= 2


def flat(seed: int, length: int = 1536) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs whose attention is spread over all keys, so that at most thresholds everything is tail."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 1, length, 16, generator=generator, dtype=torch.float64) for _ in "qkv")
    return query, key, value


@pytest.mark.parametrize("threshold", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("lists", ["kv_head", "head"])
def test_the_threshold_bounds_the_variance(threshold: float, lists: str) -> None:
    """Mass that is sampled errs by no more than sqrt(threshold) in the root mean square, and not to one side."""
    query, key, value = flat(int(threshold * 1000))
    config = S2OConfig(threshold=threshold, ranking=Ranking(lists=lists, sample=1, near_keys=0))
    got = reference_attention(query, key, value, Visibility(True), config=config)
    mask = torch.ones(1536, 1536, dtype=torch.bool).tril()
    logits = (query @ key.mT * 0.25).masked_fill(~mask, -torch.inf)
    error = (got.lse - logits.logsumexp(-1)).exp()[..., 256:] - 1
    assert error.square().mean() < threshold
    assert error.mean().abs() < 0.2 * threshold**0.5
    wrong = (got.output - dense(query, key, value, mask)).square().mean()
    assert wrong < threshold * value.square().mean()


def test_a_sampled_tail_errs_less_than_one_left_out() -> None:
    query, key, value = flat(5)
    want = dense(query, key, value, torch.ones(1536, 1536, dtype=torch.bool).tril())
    errors = {}
    for rule in ("sampled", "dropped"):
        config = S2OConfig(threshold=0.03, ranking=Ranking(rule=rule, near_keys=0))
        result = reference_attention(query, key, value, Visibility(True), config=config)
        errors[rule] = float((result.output - want).square().sum())
    assert errors["sampled"] < 0.2 * errors["dropped"]
