"""Digits in channels of float8, which make a product the sum of a logit and what is added to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.kernels import quantise
from s2o_compile.ops.kernels.arguments import LOG2_E, Arguments
from s2o_compile.ops.kernels.fold import fold
from s2o_compile.ops.kernels.helpers import FLOAT8_REACH
from s2o_compile.ops.kernels.merge import MergedGuides
from s2o_compile.ops.kernels.quantise import DIGITS, FLOAT8, Operands, Units, quantise_keys
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
    channels = torch.stack([torch.randperm(64)[:36].sort().values for _ in range(batch * kv_heads)])
    channels = channels.view(batch, kv_heads, 36).int().to(DEVICE)
    keys = quantise_keys(key, units, channels, digits=DIGITS.value)[1]
    units.ranges[0] = FLOAT8_REACH.value
    step = (10**log_unit * units.ranges[1] / FLOAT8_REACH.value)[..., None, None, None]
    guides = torch.zeros(batch, kv_heads, lists, segments * most, 36 + DIGITS.value, device=DEVICE).to(FLOAT8)
    counts = torch.randint(1, most + 1, (batch, kv_heads, lists, segments), dtype=torch.int32, device=DEVICE)
    reach, lse = torch.randn(2, batch, kv_heads, lists, segments, most, device=DEVICE) * step[..., None]
    reach, lse = reach.abs(), lse * 10**log_size
    neglected = torch.rand(batch, kv_heads, device=DEVICE) * step[..., 0, 0, 0]
    merged = MergedGuides(guides, guides, counts, reach.flatten(3), counts, counts)
    fold(arguments, Operands(guides, keys, units.ranges, True), merged, lse.flatten(3), neglected)
    got = (guides.float() @ keys[:, :, None].float().mT * step).unflatten(3, (segments, most))
    want = (reach.square() + (neglected * LOG2_E).square()[..., None, None, None]).sqrt() - lse
    real = torch.arange(most, device=DEVICE) < counts[..., None]
    assert (got[~real] == 0).all()
    # The interpreter rounds to float8 wrongly just below powers of 2, and cuts small numbers off.
    fits = real & (want.abs() <= (2**15.7 if DEVICE == "cuda" else 2**10) * step)
    error, size = (got - want[..., None]).abs().amax(-1), want.abs()
    is_close = error <= 2**-8 * size + 2**-7 * step
    if DEVICE == "cuda":
        assert is_close[fits].all()
    elif fits.sum() > 50:
        assert is_close[fits].float().mean() > 0.6
    assert (error <= size / 2 + 2**-2 * step)[fits].all()
    assert (got.sign() == want.sign()[..., None])[real & (size > step)].all()


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
