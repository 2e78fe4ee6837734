"""Guides and keys as the kernels rank them: pooled, and in float8."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.kernels import guides as guides_kernel
from s2o_compile.ops.kernels.channels import sample_moments, select_channels
from s2o_compile.ops.kernels.helpers import FLOAT8_REACH
from s2o_compile.ops.kernels.quantise import Operands, quantise
from s2o_compile.ops.rule.channels import project
from s2o_compile.ops.rule.guides import pool_guides

from ..examples import examples
from .comparison import COARSEST, largest_difference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int) -> torch.Tensor:
    """Numbers in half precision, not contiguous."""
    return torch.randn(*shape[:-1], shape[-1] + 3, device=DEVICE).half()[..., 1:-2]


@settings(max_examples=examples(12))
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 3]), st.integers(1, 90)),
    channels=st.sampled_from([16, 40]),
    pool=st.sampled_from([1, 2, 8, 32]),
    per=st.sampled_from(["head", "kv_head"]),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_guides_are_pooled_queries(
    sizes: tuple[int, ...], channels: int, pool: int, per: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(sum(sizes))
    query, config = random(*sizes, channels).to(dtype), S2OConfig(ranking=Ranking(pool=pool, guides=per))
    want, got = pool_guides(query.double(), config), guides_kernel.pool_guides(query, config)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert largest_difference(got, want) <= 2 * torch.finfo(dtype).eps * want.abs().max()


def operands(bias: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Guides of 2 heads and 600 keys, with a bias of single channels and a key far from all others."""
    torch.manual_seed(2)
    key = random(2, 2, 600, 40) + bias * (torch.arange(40, device=DEVICE) % 8 == 0)
    key[1, 1, 0] += 60
    return random(2, 2, 2, 70, 40), key.half()


def restored(quantised: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """Guides and centred keys that stand for what was quantised."""
    of_guides, of_keys = quantised.ranges[..., None, None] / FLOAT8_REACH.value
    return quantised.guides.float() * of_guides[..., None], quantised.key.float() * of_keys


@pytest.mark.parametrize("bias", [0.0, 30.0])
def test_float8_keeps_its_share_of_each_number(bias: float) -> None:
    """Of keys from their mean: a bias that all share, or one far key, takes no precision from the others."""
    guides, key = operands(bias)
    quantised = quantise(guides, key)[0]
    got_guides, got_key = restored(quantised)
    smallest = 2**-9 / FLOAT8_REACH.value * quantised.ranges[0, ..., None, None, None]
    assert ((got_guides - guides).abs() <= COARSEST * guides.abs() + smallest).all()
    centred = key.float() - key.float().mean(2, keepdim=True)
    shift = (got_key - centred)[:, :, 1:].mean(2, keepdim=True)
    assert shift.abs().max() <= 1
    assert ((got_key - centred - shift).abs() <= COARSEST * (centred.abs() + 1)).all()


def test_float8_of_a_part_of_the_guides_is_that_of_all() -> None:
    """But for what is tiny beside the largest, as units differ by powers of two alone."""
    guides, key = operands()
    guides[:, :, :, 30:] *= 5
    (few, key_beside_few), (many, key_beside_many) = (
        restored(quantise(x.contiguous(), key)[0]) for x in (guides[:, :, :, :30], guides)
    )
    assert torch.equal(key_beside_few, key_beside_many)
    assert largest_difference(few, many[:, :, :, :30]) <= 2**-6
    is_large = guides[:, :, :, :30].abs() > 0.1
    assert torch.equal(few[is_large], many[:, :, :, :30][is_large])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_numbers_make_the_logits_of_their_group_nan(bad: float) -> None:
    """So that all its keys are visited, and none of another group's."""
    guides, key = operands()
    key[1, 0, 77, 5] = bad
    got = quantise(guides, key)[0]
    logits = got.guides.float() @ got.key.float()[:, :, None].mT * got.ranges.prod(0)[..., None, None, None]
    assert logits[1, 0].isnan().all()
    assert logits.isfinite().sum() == logits.numel() * 3 / 4


@settings(max_examples=examples(8))
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 3]), st.integers(1, 90)),
    keys=st.sampled_from([2, 70, 1100, 4100]),
    channels=st.sampled_from([(16, 9), (40, 20), (40, 39), (80, 64)]),
    pads=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_the_strongest_channels_are_those_of_the_specification(
    sizes: tuple[int, int, int, int], keys: int, channels: tuple[int, int], pads: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(keys + sum(sizes))
    size, wanted = channels
    spread = torch.logspace(0, -1, size, device=DEVICE)[torch.randperm(size)].to(dtype)
    guides, key = random(*sizes, size).to(dtype) * spread, random(*sizes[:2], keys, size).to(dtype)
    key[0, 0, 0, 1] = torch.nan
    padding = torch.rand(sizes[0], keys, device=DEVICE) > 0.3 if pads else None
    want = project(guides, key, wanted, 0.5, None if padding is None else padding[:, None])
    picked, neglected = select_channels(sample_moments(guides, key, padding), key, padding, wanted, 0.5)
    torch.testing.assert_close(neglected.double(), want.neglected, rtol=1e-3, atol=1e-7)
    got = [x.take_along_dim(picked.long()[:, :, None], -1) for x in (guides.flatten(2, 3), key)]
    counts = torch.arange(keys, device=DEVICE) > 0  # The product with zero in `project` spreads the NaN.
    counts = counts if padding is None else counts & padding[:, None, None]
    products = [q.double() @ k.double().mT for q, k in (got, (want.guides.flatten(2, 3), want.key))]
    torch.testing.assert_close(*(torch.where(counts, x, 0) for x in products), rtol=1e-3, atol=1e-3)


def test_picked_channels_are_those_of_all_in_float8() -> None:
    guides, key = operands()
    channels = torch.stack([torch.randperm(40)[:33] for _ in range(4)]).view(2, 2, 33).int().to(DEVICE)
    all_channels, subset = quantise(guides, key, channels)
    picked = channels.long()[:, :, None]
    assert torch.equal(subset.guides.float(), all_channels.guides.float().take_along_dim(picked[:, :, None], -1))
    assert torch.equal(subset.key.float(), all_channels.key.float().take_along_dim(picked, -1))
    assert subset.ranges is all_channels.ranges
