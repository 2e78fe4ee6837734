"""The log-sum-exps of guides, against the same sums spelled out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.kernels.arguments import Arguments
from s2o_compile.ops.kernels.channels import key_covariance, sample_moments
from s2o_compile.ops.kernels.helpers import FIRST_KEYS, FLOAT8_REACH
from s2o_compile.ops.kernels.merge import MergedGuides, merge
from s2o_compile.ops.kernels.normaliser import normalisers
from s2o_compile.ops.kernels.quantise import Operands, quantise
from s2o_compile.ops.visibility import Visibility

from ..examples import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 0.25


def summed(arguments: Arguments, guides: torch.Tensor, key: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """Log-sum-exps [B, Hkv, G, n] of guides whose first queries stand at `first`; -inf where nothing is seen."""
    geometry, ranking = arguments.geometry, arguments.config.ranking
    sample = ranking.sample
    logits = guides.double() @ key[:, :, None].double().mT * arguments.scale
    column = torch.arange(key.shape[2], device=DEVICE)
    per_segment = arguments.guides_of_segment if ranking.merges else ranking.segment
    segment = torch.arange(guides.shape[3], device=DEVICE) // per_segment
    low, high = (x[segment][:, None] for x in geometry.spans(range(geometry.segments), key.device).unbind(1)[1:])
    nearby = (column >= low) & (column < high) & (column <= first[..., None] + geometry.offset)
    is_drawn = (column % sample == sample // 2) & (column >= FIRST_KEYS.value)
    weight = torch.where(column < FIRST_KEYS.value, 1.0, torch.where(is_drawn, float(sample), 0.0)) * (column < low)
    return (logits + torch.where(nearby, 1.0, weight).log()).logsumexp(-1)


@pytest.mark.hypothesis
@settings(max_examples=examples(12), deadline=None)
@given(
    st.tuples(
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 3),
        st.integers(1, 300),
        st.one_of(st.integers(1, 700), st.sampled_from([64, 320, 640])),
    ),
    st.sampled_from([0, 7, 40, 200, 1000]),
    st.sampled_from([1, 2, 3, 16]),
    st.sampled_from([0.0, 100.0, -500.0]),
    st.sampled_from([1.0, 8.0]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_log_sum_exps_are_those_of_the_keys_that_count(
    sizes: tuple[int, ...],
    further: int,
    sample: int,
    first_logit: float,
    size: float,
    merges: bool,
    in_float8: bool,
    seed: int,
) -> None:
    """Whatever the first key has beside the others: its own share, or theirs, may be beyond what float32 holds.

    With offsets at which guides see all keys, no key may be near any.
    """
    batch, kv_heads, group, queries, keys = sizes
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(batch, heads, length, 32, generator=generator).half()
        for heads, length in ((kv_heads * group, queries), (kv_heads, keys))
    )
    query *= size
    query[..., 0], key[..., 0] = 4, 0
    key[:, :, 0, 0] = first_logit
    query, key = query.to(DEVICE), key.to(DEVICE)
    config = S2OConfig(ranking=Ranking(sample=sample, near_keys=0, merge_length=0, radius=1.75 if merges else 0.0))
    terms = Visibility(True, keys - queries + further)
    arguments = Arguments(query, key, key, terms, None, SCALE, 0.0, config, query.device)
    merged = _merged(arguments) if merges else None
    guides = query.unflatten(1, (kv_heads, group)) if merged is None else merged.rows
    is_guide, first = _standing(arguments, merged)
    guides = torch.where(is_guide[..., None], guides, 0)
    operands = quantise(guides, key)[0] if in_float8 else Operands(guides, key, guides)
    got = normalisers(arguments, operands, merged) * math.log(2)
    if in_float8:
        units = operands.ranges / FLOAT8_REACH.value
        guides = operands.guides.float() * units[0, :, :, None, None, None]
        key = operands.key.float() * units[1, :, :, None, None]
    want = summed(arguments, guides, key, first)
    counts = is_guide & (want > -math.inf)
    assert counts.any() or queries > keys
    error = torch.where(counts, got - want, 0).abs()
    assert error.max() < _tolerance(guides, key, in_float8)


def _tolerance(guides: torch.Tensor, key: torch.Tensor, in_float8: bool) -> float:
    """Of float8, half of the powers of 2 are within 4%, and tensor cores cut products to 14 bits of the largest."""
    product = SCALE * (guides.abs().max() * key.abs().max()).item()
    cut = guides.shape[-1] * 2**-13 * product if in_float8 and DEVICE != "cpu" else 0
    return (0.045 if in_float8 else 2e-3) + 1e-5 * product + cut


def _merged(arguments: Arguments) -> MergedGuides:
    query, key = arguments.query.unflatten(1, (arguments.kv_heads, -1)), arguments.key
    return merge(arguments, key_covariance(sample_moments(query, key, None), key, None, SCALE))


def _standing(arguments: Arguments, merged: MergedGuides | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Which guides there are, and the positions of their first queries, both [B, Hkv, G or 1, n]."""
    if merged is None:
        batch, _, queries, _ = arguments.query.shape
        first = torch.arange(queries, device=DEVICE).expand(batch, arguments.kv_heads, arguments.group_size, queries)
        return torch.ones_like(first, dtype=torch.bool), first
    place = torch.arange(arguments.guides_of_segment, device=DEVICE)
    return (place < merged.counts[..., None]).flatten(-2), merged.first
