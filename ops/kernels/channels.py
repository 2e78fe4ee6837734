"""Second moments of queries and keys, and what follows from them: the channels that carry most of the products of both,
and the covariance of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rule.channels import sampling_step
from .arguments import padded
from .helpers import float32
from .launch import launch
from .variants import kernel

_PART = 1024
"""Rows whose second moments one program sums."""
_ROWS = 64
_COLUMNS = 64
"""Rows and channels of a block."""


class Moments(NamedTuple):
    """Sums over a sample of the queries, or pooled guides, and of the keys of each KV head, in parts.

    Attributes:
        products: x x' [B * Hkv, queries or keys, parts, BLOCK_D, BLOCK_D] float32.
        sums: x of keys [B * Hkv, parts, BLOCK_D] float32.
        rows: How many queries and how many keys are summed, but for padding.
        step: Every how many keys are.
    """

    products: torch.Tensor
    sums: torch.Tensor
    rows: tuple[int, int]
    step: int

    @property
    def parts(self) -> int:
        """In how many parts the sums are."""
        return self.sums.shape[1]


class ChannelSubset(NamedTuple):
    """Channels of each KV head [B, Hkv, channels] int32, and `Projected.neglected` of them [B, Hkv] float32."""

    channels: torch.Tensor
    neglected: torch.Tensor


def sample_moments(
    guides: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None, places: torch.Tensor | None = None
) -> Moments:
    """The second moments of guides and keys, and the sum of keys; what is not finite counts as 0.

    Args:
        guides: [B, Hkv, guide heads, guides, D].
        key: [B, Hkv, Lk, D].
        padding: [B, Lk], False for keys that do not count; None for none.
        places: [Lk] int32, the rows of keys in pages; None where they follow one another.
    """
    batch, kv_heads, heads, per_head, size = guides.shape
    steps = sampling_step(heads * per_head), sampling_step(key.shape[2])
    rows = heads * -(-per_head // steps[0]), -(-key.shape[2] // steps[1])
    parts, width = -(-max(rows) // _PART), padded(size)
    moments = torch.empty(batch * kv_heads, 2, parts, width, width, dtype=torch.float32, device=key.device)
    sums = torch.empty(batch * kv_heads, parts, width, dtype=torch.float32, device=key.device)
    columns = min(width, _COLUMNS)
    of_padding = (key, 0) if padding is None else (padding, padding.stride(0))
    launch(
        moments_kernel, (parts, 2 * (width // columns), batch * kv_heads),
        guides, key, of_padding[0], key if places is None else places, moments, sums,
        *guides.stride()[:4], *key.stride()[:3], of_padding[1],
        kv_heads, heads, per_head, key.shape[2], *steps,
        HAS_PADDING=padding is not None, PAGED=places is not None,
        PRECISION="ieee" if key.dtype == torch.float32 else "tf32",
        D=size, PART=_PART, BLOCK_N=_ROWS, BLOCK_D=width, BLOCK_C=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
    return Moments(moments, sums, rows, steps[1])


def select_channels(
    moments: Moments, key: torch.Tensor, padding: torch.Tensor | None, channels: int, scale: float
) -> ChannelSubset:
    """`rule.channels.project` where it picks channels, without its products.

    Args:
        moments: `sample_moments` of guides and of `key`.
        key: [B, Hkv, Lk, D].
        padding: [B, Lk], False for keys that do not count; None for none.
        channels: How many to pick, about half of all or more.
        scale: Factor of the logits.
    """
    batch, kv_heads, keys, size = key.shape
    width = padded(size)
    energies = torch.empty(batch * kv_heads, width, dtype=torch.float32, device=key.device)
    found = ChannelSubset(
        torch.empty(batch, kv_heads, channels, dtype=torch.int32, device=key.device),
        torch.empty(batch, kv_heads, dtype=torch.float32, device=key.device),
    )
    of_padding = (key, 0) if padding is None else (padding, padding.stride(0))
    launch(
        choose_kernel, (batch * kv_heads,),
        moments.products, moments.sums, energies, *found, *of_padding, *moments.rows, kv_heads, keys, moments.step,
        scale,
        HAS_PADDING=padding is not None, PARTS=moments.parts, CHANNELS=channels,
        D=size, BLOCK_D=width, BLOCK_C=min(width, 32), num_warps=8, num_stages=1,
    )  # fmt: skip
    return found


def key_covariance(moments: Moments, key: torch.Tensor, padding: torch.Tensor | None, scale: float) -> torch.Tensor:
    """The covariance of keys [B, Hkv, Lk, D], times `scale` squared: [B, Hkv, BLOCK_D, BLOCK_D] float32."""
    batch, kv_heads, keys, size = key.shape
    width = padded(size)
    covariance = torch.empty(batch, kv_heads, width, width, dtype=torch.float32, device=key.device)
    of_padding = (key, 0) if padding is None else (padding, padding.stride(0))
    columns = min(width, 32)
    launch(
        covariance_kernel, (width // columns, batch * kv_heads),
        moments.products, moments.sums, covariance, *of_padding, moments.rows[1], kv_heads, keys, moments.step, scale,
        HAS_PADDING=padding is not None, PARTS=moments.parts, BLOCK_D=width, BLOCK_C=columns, num_warps=4, num_stages=1,
    )  # fmt: skip
    return covariance


def pick_channels(x: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """The `channels` [B, Hkv, picked] of guides or keys [B, Hkv, heads, rows, D]: [B, Hkv, heads, rows, picked]."""
    batch, kv_heads, heads, rows, _ = x.shape
    picked = channels.shape[-1]
    result = x.new_empty(batch, kv_heads, heads, rows, picked)
    launch(
        pick_kernel, (-(-rows // _ROWS), heads, batch * kv_heads),
        x, channels, result, *x.stride()[:4], kv_heads, rows,
        PICKED=picked, BLOCK_P=padded(picked), BLOCK_N=_ROWS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return result


@kernel
def moments_kernel(
    guides, key, padding, places, moments, sums,
    guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n, key_stride_b, key_stride_h, key_stride_n,
    padding_stride_b, kv_heads, heads, per_head, keys, guide_step, key_step,
    HAS_PADDING: tl.constexpr, PAGED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum x x' over PART rows: moments [B * Hkv, guides or keys, parts, BLOCK_D, BLOCK_D]; and x: `sums` of keys.

    Rows are every `guide_step`-th guide of each head, and every `key_step`-th key; what is not finite counts as 0.
    Program (part; guides or keys and block of columns; batch entry and KV head).
    """
    part, of_keys = tl.program_id(0), tl.program_id(1) % 2
    first_column = tl.program_id(1) // 2 * BLOCK_C
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    padding += batch * padding_stride_b
    first = guides + batch * guides_stride_b + kv_head * guides_stride_kv
    if of_keys == 1:
        first = key + batch * key_stride_b + kv_head * key_stride_h
    stride_n = tl.where(of_keys == 1, key_stride_n, guides_stride_n)
    step = tl.where(of_keys == 1, key_step, guide_step)
    of_head = (tl.where(of_keys == 1, keys, per_head) + step - 1) // step
    rows = tl.where(of_keys == 1, 1, heads) * of_head
    channel, column = tl.arange(0, BLOCK_D), first_column + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_D, BLOCK_C], tl.float32)
    of_columns = tl.zeros([BLOCK_C], tl.float32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, rows), BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        inside, place = row < rows, (row % of_head) * step
        is_key = row < tl.where(of_keys == 1, rows, 0)
        if HAS_PADDING:
            inside = inside & (tl.load(padding + place, mask=is_key, other=1) != 0)
        if PAGED:
            place = tl.load(places + place, mask=is_key, other=place)
        pointers = first + (row // of_head).to(tl.int64) * guides_stride_h + place.to(tl.int64) * stride_n
        x, y = _load_finite(pointers, inside, channel, D), _load_finite(pointers, inside, column, D)
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
        of_columns += tl.sum(y.to(tl.float32), 0)
    place = (tl.program_id(2) * 2 + of_keys).to(tl.int64) * tl.num_programs(0) + part
    tl.store(moments + (place * BLOCK_D + channel[:, None]) * BLOCK_D + column[None, :], total)
    if of_keys == 1:
        tl.store(sums + (tl.program_id(2) * tl.num_programs(0) + part) * BLOCK_D + column, of_columns)


@triton.jit
def _load_finite(rows, inside, channel, D: tl.constexpr):
    """The `channel`s of rows, 0 where they are not finite."""
    x = tl.load(rows[:, None] + channel[None, :], mask=inside[:, None] & (channel < D)[None, :], other=0.0)
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0)


@kernel
def choose_kernel(
    moments, sums, energies, channels, neglected, padding, padding_stride_b, guide_rows, key_rows,
    kv_heads, keys, key_step, scale,
    HAS_PADDING: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the CHANNELS channels of most energy, in order, and the variance of logits that the others carry.

    Energy is the product of the mean squares of guides and of keys, of whose sampled rows those count that are not
    padding. `energies` [B * Hkv, BLOCK_D] hands energies and then ranks from rows to columns.
    Program (batch entry and KV head).
    """
    scale = float32(scale)
    if HAS_PADDING:
        padding += (tl.program_id(0) // kv_heads).to(tl.int64) * padding_stride_b
        key_rows = _count(padding, keys, key_step)
    square: tl.constexpr = BLOCK_D * BLOCK_D
    of_guides = moments + tl.program_id(0).to(tl.int64) * (2 * PARTS * square)
    of_keys = of_guides + PARTS * square
    sums += tl.program_id(0) * (PARTS * BLOCK_D)
    energies += tl.program_id(0) * BLOCK_D
    channel = tl.arange(0, BLOCK_D)
    diagonal = channel * (BLOCK_D + 1)
    energy = _sum(of_guides, diagonal, channel < D, square, PARTS) * _sum(of_keys, diagonal, channel < D, square, PARTS)
    energy = tl.where((channel < D) & (energy == energy), energy, -1.0)
    tl.store(energies + channel, energy)
    tl.debug_barrier()
    rank = tl.zeros([BLOCK_D], tl.int32)
    for start in range(0, BLOCK_D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        other = tl.load(energies + column)[None, :]
        ahead = (other > energy[:, None]) | ((other == energy[:, None]) & (column[None, :] < channel[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    chosen = rank < CHANNELS
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(channels + tl.program_id(0) * CHANNELS + place, channel, mask=chosen)
    tl.debug_barrier()
    tl.store(energies + channel, rank.to(tl.float32))
    tl.debug_barrier()

    mean = _sum(sums, channel, channel < D, BLOCK_D, PARTS) / key_rows
    missing = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, BLOCK_D, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        left = (tl.load(energies + column) >= CHANNELS) & (column < D)
        of_column = _sum(sums, column, left, BLOCK_D, PARTS) / key_rows
        left = left[None, :] & ((rank >= CHANNELS) & (channel < D))[:, None]
        tile = channel[:, None] * BLOCK_D + column[None, :]
        spread = _sum(of_keys, tile, left, square, PARTS) / key_rows - mean[:, None] * of_column[None, :]
        product = _sum(of_guides, tile, left, square, PARTS) / guide_rows * spread
        missing += tl.sum(tl.where(left, product, 0.0), 1)
    variance = tl.sum(missing, 0) * scale * scale
    tl.store(neglected + tl.program_id(0), tl.where(variance < 0, 0.0, variance))


@kernel
def covariance_kernel(
    moments, sums, covariance, padding, padding_stride_b, key_rows, kv_heads, keys, key_step, scale,
    HAS_PADDING: tl.constexpr, PARTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write columns of the covariance of the sampled keys that are not padding, times `scale` squared.

    Program (block of columns; batch entry and KV head).
    """
    scale = float32(scale)
    if HAS_PADDING:
        padding += (tl.program_id(1) // kv_heads).to(tl.int64) * padding_stride_b
        key_rows = _count(padding, keys, key_step)
    square: tl.constexpr = BLOCK_D * BLOCK_D
    place = tl.program_id(1).to(tl.int64)
    of_keys = moments + (2 * place + 1) * (PARTS * square)
    sums += place * (PARTS * BLOCK_D)
    channel, column = tl.arange(0, BLOCK_D), tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    everywhere = channel[:, None] + column[None, :] >= 0
    tile = channel[:, None] * BLOCK_D + column[None, :]
    product = _sum(of_keys, tile, everywhere, square, PARTS) / key_rows
    mean = _sum(sums, channel, channel >= 0, BLOCK_D, PARTS) / key_rows
    of_columns = _sum(sums, column, column >= 0, BLOCK_D, PARTS) / key_rows
    tl.store(covariance + place * square + tile, (product - mean[:, None] * of_columns[None, :]) * (scale * scale))


@triton.jit
def _count(padding, keys, step):
    """How many of every `step`-th key are not padding, at least 1."""
    lane = tl.arange(0, 1024)
    number = tl.zeros([1024], tl.int32)
    for start in range(0, keys, 1024 * step):
        place = start + lane * step
        number += (tl.load(padding + place, mask=place < keys, other=0) != 0).to(tl.int32)
    return tl.maximum(tl.sum(number, 0), 1)


@triton.jit
def _sum(parts, place, inside, stride: tl.constexpr, PARTS: tl.constexpr):
    """The sum of `parts` at a place of each of them."""
    total = tl.zeros(place.shape, tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + part * stride + place, mask=inside, other=0.0)
    return total


@kernel
def pick_kernel(
    x, channels, result, stride_b, stride_kv, stride_h, stride_n, kv_heads, rows,
    PICKED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the `channels` [B, Hkv, PICKED] of rows of x [B, Hkv, heads, rows, D].

    Program (block of rows; head; batch entry and KV head).
    """
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    x += batch * stride_b + kv_head * stride_kv + tl.program_id(1).to(tl.int64) * stride_h
    row, column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    channel = tl.load(channels + tl.program_id(2) * PICKED + column, mask=column < PICKED, other=0)
    inside = (row < rows)[:, None] & (column < PICKED)[None, :]
    picked = tl.load(x + row.to(tl.int64)[:, None] * stride_n + channel[None, :], mask=inside, other=0.0)
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * rows + row
    tl.store(result + place[:, None] * PICKED + column[None, :], picked, mask=inside)
