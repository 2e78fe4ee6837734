"""Digits in channels of float8, which make a product the sum of a logit and what is added to it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.kernels import quantise
from s2o_compile.ops.kernels.arguments import LOG2_E, Arguments
from s2o_compile.ops.kernels.fold import fold
from s2o_compile.ops.kernels.helpers import FLOAT8_REACH
from s2o_compile.ops.kernels.importance import score
from s2o_compile.ops.kernels.merge import MergedGuides
from s2o_compile.ops.kernels.merged_importance import LEAST_UNIT
from s2o_compile.ops.kernels.quantise import DIGITS, FLOAT8, Operands, Units, quantise_keys
from s2o_compile.ops.kernels.rank import scoring_of
from s2o_compile.ops.kernels.scoring import Scoring
from s2o_compile.ops.rule import channels
from s2o_compile.ops.visibility import Visibility

from ..examples import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.hypothesis
@settings(max_examples=examples(20), deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 2), st.integers(1, 5)),
    st.sampled_from([1, 3, 9]),
    st.floats(-4, 4.5),
    st.floats(-6, 1),
    st.integers(0, 2**16),
)
def test_products_are_logits_less_log_sum_exps(
    sizes: tuple[int, int, int, int], group: int, log_size: float, log_unit: float, seed: int
) -> None:
    """Whatever the size of log-sum-exps in units of products, as far as half precision has room for them.

    Guides of 0, whose logits are 0; as many as a segment has, the others stay as they are.
    """
    torch.manual_seed(seed)
    batch, kv_heads, lists, segments = sizes
    key = torch.randn(batch, kv_heads, 70, 64, device=DEVICE).half()
    query = key.repeat_interleave(group, dim=1)
    config = S2OConfig(ranking=Ranking(merge_length=0))
    arguments = Arguments(query, key, key, Visibility(True), None, 10**log_unit / LOG2_E, 0.0, config, query.device)
    most = arguments.guides_of_segment
    units = Units.of(key)
    picked = torch.stack([torch.randperm(64)[:36].sort().values for _ in range(batch * kv_heads)])
    picked = picked.view(batch, kv_heads, 36).int().to(DEVICE)
    keys = quantise_keys(key, units, picked, digits=DIGITS.value)[1]
    units.ranges[0] = FLOAT8_REACH.value
    step = (10**log_unit * units.ranges[1] / FLOAT8_REACH.value)[..., None, None, None]
    guides = torch.zeros(batch, kv_heads, lists, segments * most, 36 + DIGITS.value, device=DEVICE).to(FLOAT8)
    counts = torch.randint(1, most + 1, (batch, kv_heads, lists, segments), dtype=torch.int32, device=DEVICE)
    reach, lse = torch.randn(2, batch, kv_heads, lists, segments, most, device=DEVICE) * step
    reach, lse = reach.abs(), lse * 10**log_size
    neglected = torch.rand(batch, kv_heads, device=DEVICE) * step[..., 0, 0, 0]
    merged = MergedGuides(guides, guides, counts, reach.flatten(3), counts, counts)
    fold(arguments, Operands(guides, keys, units.ranges, True), merged, lse.flatten(3), neglected)
    products = guides.float() @ keys[:, :, None].float().mT
    got = products.unflatten(3, (segments, most)) * step[..., None]
    want = (reach.square() + (neglected * LOG2_E).square()[..., None, None, None]).sqrt() - lse
    real = torch.arange(most, device=DEVICE) < counts[..., None]
    assert (got[~real] == 0).all()
    error, size = (got - want[..., None]).abs().amax(-1), want.abs()
    assert (error <= 2**-8 * size + 2**-6.9 * step)[real & (size <= 2**15.7 * step)].all()
    assert (got.sign() == want.sign()[..., None])[real & (size > step)].all()


def importance_by_guides(arguments: Arguments, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest share over the threshold that a guide gives each key [B, Hkv, lists, segments, Lk], plainly.

    And whether it is taken in the channels that are picked [B, Hkv].
    """
    merged, subset = scoring.merged, scoring.subset
    assert merged is not None and subset is not None and scoring.neglected is not None and subset.folded
    most, ranges = arguments.guides_of_segment, scoring.all_channels.ranges
    unit = arguments.scale * LOG2_E * (ranges[0] / FLOAT8_REACH.value * (ranges[1] / FLOAT8_REACH.value))
    neglected = scoring.neglected
    is_picked = (neglected <= channels.NEGLECT_LIMIT) & (unit >= LEAST_UNIT.value)
    digits = DIGITS.value

    def products(guides: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return guides.float() @ key[:, :, None].float().mT * unit[..., None, None, None]

    of_all = products(scoring.all_channels.guides, scoring.all_channels.key)
    of_picked = products(subset.guides[..., :-digits], subset.key[..., :-digits])
    allowed = (merged.reach.square() + (neglected * LOG2_E).square()[..., None, None]).sqrt()
    origin = torch.where(is_picked[..., None, None], allowed, merged.reach) - scoring.guide_lse
    logits = torch.where(is_picked[..., None, None, None], of_picked, of_all) + origin[..., None]
    real = torch.arange(most, device=DEVICE) < merged.counts[..., None]
    logits = logits.unflatten(3, (-1, most)).masked_fill(~real[..., None], -math.inf)
    return logits.amax(4).exp2() / arguments.config.threshold, is_picked


@pytest.mark.parametrize(
    ("heads", "radius", "lists", "sizes"),
    [
        (2, 1.0, "kv_head", (1.0, 1.0)),
        (6, 0.01, "kv_head", (1.0, 1.0)),  # More guides than are scored at once.
        (6, 1e4, "kv_head", (1.0, 1.0)),  # One of each head.
        (3, 1.0, "head", (1.0, 1.0)),
        (2, 1.0, "kv_head", (1.0, 1e-3)),  # Units too small for digits.
        (2, 1.0, "kv_head", (1.0, 8.0)),  # Too much neglected.
    ],
)
@pytest.mark.parametrize("segment", [16, 32])
def test_importance_is_that_of_the_guides_that_there_are(
    heads: int, radius: float, lists: str, sizes: tuple[float, float], segment: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of keys of some sizes, key by key, whatever is where there are no guides."""
    monkeypatch.setattr(quantise, "ranks_in_float8", lambda *_: True)
    monkeypatch.setattr(quantise, "adds_in_half", lambda device: True)
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **kind: undefined(new_empty(x, *size, **kind)))
    torch.manual_seed(segment)
    ranking = Ranking(merge_length=0, radius=radius, lists=lists, channels=40, segment=segment, near_keys=0)
    query, key = torch.randn(1, 2 * heads, 150, 64), torch.randn(1, 2, 190, 64)
    query = 2 * query[:, :, torch.arange(150) // 4 * 4] + 0.1 * query
    key = key * torch.linspace(1.5, 0.02, 64) * torch.tensor(sizes)[:, None, None]
    query, key = (x.half().to(DEVICE) for x in (query, key))
    config = S2OConfig(threshold=0.02, ranking=ranking)
    arguments = Arguments(query, key, key, Visibility(True, 40), None, 0.1, 0.0, config, query.device)
    sample = query.unflatten(1, (2, heads))
    scoring = scoring_of(arguments, sample, sample)
    segments = range(arguments.geometry.ranked_segments)
    got = score(arguments, scoring, segments)[0].float()
    (want,), (is_picked,) = importance_by_guides(arguments, scoring)
    assert is_picked.tolist() == [True, sizes[1] == 1]
    compared = 0
    for number in segments:
        low = arguments.geometry.span(number).low
        one, other = (x[..., number, 1:low] for x in (got, want))
        is_near = (other > 1e-3) & (other < 1e4)
        assert ((one.log2() - other.log2()).abs() <= 0.1)[is_near].all()
        compared += int(is_near.sum())
    assert compared > 600


def undefined(x: torch.Tensor) -> torch.Tensor:
    """Memory with what is NaN in float8."""
    x.view(torch.uint8).fill_(0x7F)
    return x


def test_few_channels_hold_no_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do all channels, and those of queries that are not merged, of float32, or where float8 adds in float32."""
    monkeypatch.setattr(quantise, "ranks_in_float8", lambda guides, softcap, device: guides.dtype != torch.float32)

    def picked(size: int, channels: int | None, half: bool = True, radius: float = 1.0) -> tuple[int | None, bool]:
        monkeypatch.setattr(quantise, "adds_in_half", lambda device: half)
        query = torch.zeros(1, 1, 40, size, device=DEVICE).half()
        config = S2OConfig(ranking=Ranking(merge_length=0, channels=channels, radius=radius))
        arguments = Arguments(query, query, query, Visibility(), None, 1.0, 0.0, config, query.device)
        return quantise.picked_channels(arguments)

    assert picked(128, 64) == (62, True)
    assert picked(128, 64, half=False) == (64, False)
    assert picked(128, 64, radius=0.0) == (64, False)
    assert picked(64, 33) == (33, False)
    assert picked(64, 35) == (33, True)
    assert picked(64, 64) == picked(64, None) == picked(128, 40) == (None, False)
