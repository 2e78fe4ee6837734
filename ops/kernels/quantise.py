"""Guides and keys in float8, for ranking on GPUs whose tensor cores multiply it twice as fast."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..rule.channels import picks_channels
from .arguments import Arguments, padded
from .channels import pick_channels
from .helpers import FLOAT8_REACH, load_rows, rows_at
from .launch import launch
from .variants import kernel

FLOAT8 = torch.float8_e4m3fn
INFINITY = tl.constexpr(0x7F800000)
NAN = tl.constexpr(0x7FC00000)
"""Of float32, as bits."""
_ROWS = 128
_LEAST_CHANNELS = 32
"""The fewest channels that are multiplied in float8."""
DIGITS = tl.constexpr(2)
"""Channels of a subset that hold a number of each guide (`fold`)."""
_SAMPLE = 256
"""The keys whose mean is the origin of all, about."""


class Units(NamedTuple):
    """What numbers in float8 are counted from, and how far they reach.

    Attributes:
        origin: [B, Hkv, D], about the mean of keys, in their dtype.
        ranges: [2, B, Hkv] float32, how far guides, and keys from the origin, reach at most; zeros at first, which
            kernels raise (`raise_range`).
    """

    origin: torch.Tensor
    ranges: torch.Tensor

    @classmethod
    def of(cls, key: torch.Tensor, places: torch.Tensor | None = None) -> Units:
        """Those of keys [B, Hkv, Lk, D], by a sample of these; `places` as in `quantise`."""
        batch, kv_heads, keys, size = key.shape
        origin = key.new_empty(batch, kv_heads, size)
        ranges = torch.empty(2, batch, kv_heads, dtype=torch.float32, device=key.device)
        launch(
            origin_kernel, (batch * kv_heads,),
            origin, ranges, key, key if places is None else places,
            *key.stride()[:3], kv_heads, keys, -(-keys // _SAMPLE),
            PAGED=places is not None, D=size, BLOCK_D=padded(size), BLOCK_N=16, num_warps=4, num_stages=3,
        )  # fmt: skip
        return cls(origin, ranges)


class Operands(NamedTuple):
    """The factors of the products that rank keys.

    Attributes:
        guides: [B, Hkv, guide heads, guides, D].
        key: [B, Hkv, Lk, D].
        ranges: [2, B, Hkv] float32, how far guides and keys reach at most; read for float8 only.
        folded: Whether the last channels are digits of what is added to the logits of guides (`fold`).
    """

    guides: torch.Tensor
    key: torch.Tensor
    ranges: torch.Tensor
    folded: bool = False

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of a launch, beside the tensors and their strides."""
        size = self.key.shape[-1]
        return {"D": size, "BLOCK_D": padded(size), "QUANTISED": self.are_quantised}

    @property
    def are_quantised(self) -> bool:
        """Whether they are in float8."""
        return self.key.dtype == FLOAT8


def ranking_operands(
    arguments: Arguments, guides: torch.Tensor, key: torch.Tensor, count: torch.Tensor | None
) -> Operands:
    """Guides [B, Hkv, guide heads, guides, D] and keys [B, Hkv, Lk, D], in float8 where that is worth it.

    `count` [B, Hkv, guide heads, segments] are the guides of each segment, None where there are all of them.
    """
    in_float8 = ranks_in_float8(guides, arguments.softcap, arguments.device)
    if not in_float8:
        return Operands(guides, key, guides)
    return quantise(guides, key, count=count, places=arguments.places)[0]


def operands_of_channels(
    arguments: Arguments, guides: torch.Tensor, channels: torch.Tensor, count: torch.Tensor | None
) -> tuple[Operands, Operands]:
    """`ranking_operands` of all channels, and of those that are picked for each KV head [B, Hkv, channels] int32."""
    key = arguments.key
    if ranks_copies(guides, channels.shape[-1], arguments.softcap, arguments.device):
        all_channels, subset = quantise(guides, key, channels, count, arguments.places)
        return all_channels, subset
    subset = Operands(pick_channels(guides, channels), pick_channels(key[:, :, None], channels)[:, :, 0], guides)
    return ranking_operands(arguments, guides, key, count), subset


def ranks_copies(guides: torch.Tensor, channels: int | None, softcap: float, device: torch.device) -> bool:
    """Whether all that ranks keys by such guides [..., D] are copies in float8: of all channels, and of picked ones.

    Not where they are projected to other directions, or the picked channels are too few.
    """
    size = guides.shape[-1]
    is_enough = channels is None or channels >= size or (picks_channels(channels, size) and channels >= _LEAST_CHANNELS)
    return is_enough and ranks_in_float8(guides, softcap, device)


def ranks_in_float8(guides: torch.Tensor, softcap: float, device: torch.device) -> bool:
    """Whether such guides [..., D] rank in float8: half precision, no soft cap, sm_89 or later."""
    if device.type != "cuda" or guides.dtype == torch.float32 or softcap or guides.shape[-1] < _LEAST_CHANNELS:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 9)


def sums_in_half(operands: Operands, takes_mean: bool, device: torch.device) -> bool:
    """Whether their products are summed in half precision, whose maxima take half the instructions (sm_90)."""
    return operands.are_quantised and not takes_mean and adds_in_half(device)


def adds_in_half(device: torch.device) -> bool:
    """Whether a device sums products of float8 in half precision."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def picked_channels(arguments: Arguments) -> tuple[int | None, bool]:
    """How many channels are picked, None for none; and whether digits take the place of others (`fold`).

    These are then as many fewer, so that products take as long; weights of sampled keys are bounded as without digits.
    """
    query, wanted = arguments.query, arguments.config.ranking.channels
    if not picks_channels(wanted, query.shape[-1]):
        return None, False
    few = wanted - DIGITS.value
    if not (arguments.config.ranking.merges and adds_in_half(arguments.device) and few >= _LEAST_CHANNELS):
        return wanted, False
    is_folded = ranks_copies(query, wanted, arguments.softcap, arguments.device)
    return (few, True) if is_folded else (wanted, False)


def quantise(
    guides: torch.Tensor,
    key: torch.Tensor,
    channels: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    places: torch.Tensor | None = None,
) -> tuple[Operands, ...]:
    """Guides and keys in float8, each in units of about how far they reach; keys from about their mean.

    Units differ by powers of two alone, so that a number is rounded alike whatever the largest beside it is.

    Taking one vector from all keys shifts a query's logits by one number, which the softmax does not see; their mean
    takes away what large biases of single channels would cost in precision (SageAttention, arXiv 2410.02367). A sample
    has as good a mean. The middle of each channel's range would be worse, as one outlying key displaces it.

    Args:
        guides: [B, Hkv, guide heads, guides, D].
        key: [B, Hkv, Lk, D].
        channels: [B, Hkv, picked] int32, of which there are operands too; None for none of these.
        count: [B, Hkv, guide heads, segments] int32, how many guides of each segment are defined; None where all are.
        places: [Lk] int32, the rows of keys in pages; None where they follow one another.
    """
    units = Units.of(key, places)
    return tuple(_split(x, guides, units) for x in _quantise(guides, key, units, channels, count, places))


def quantise_keys(
    key: torch.Tensor,
    units: Units,
    channels: torch.Tensor | None,
    places: torch.Tensor | None = None,
    digits: int = 0,
) -> list[torch.Tensor]:
    """The keys of `quantise` alone: in all channels, and in those that are picked, if there are `channels`.

    Behind these are the units of as many `digits`.
    """
    return _quantise(None, key, units, channels, None, places, digits)


def _split(rows: torch.Tensor, guides: torch.Tensor, units: Units) -> Operands:
    """Rows of guides and then of keys [B, Hkv, rows, D] as operands."""
    heads, per_head = guides.shape[2:4]
    total = heads * per_head
    return Operands(rows[:, :, :total].unflatten(2, (heads, per_head)), rows[:, :, total:], units.ranges)


def _quantise(
    guides: torch.Tensor | None,
    key: torch.Tensor,
    units: Units,
    channels: torch.Tensor | None,
    count: torch.Tensor | None,
    places: torch.Tensor | None,
    digits: int = 0,
) -> list[torch.Tensor]:
    """Guides, if there are some, and then keys [B, Hkv, rows, D]; and their picked `channels`, if there are some.

    To their reach the ranges of units are raised before.
    """
    grid, operands, options = _blocks(guides, key, units, count, places)
    launch(reach_kernel, grid, units.ranges, *operands, **options)
    batch, kv_heads, keys, size = key.shape
    rows = keys if guides is None else guides.shape[2] * guides.shape[3] + keys
    picked = 0 if channels is None else channels.shape[-1]
    width = picked + digits
    results = [key.new_empty(batch, kv_heads, rows, n, dtype=FLOAT8) for n in (size, width) if n]
    launch(
        quantise_kernel, grid,
        units.ranges, results[0], results[-1], units.ranges if channels is None else channels, *operands,
        PICKED=picked, WIDTH=width, BLOCK_P=padded(width), **options,
    )  # fmt: skip
    return results


def _blocks(
    guides: torch.Tensor | None,
    key: torch.Tensor,
    units: Units,
    count: torch.Tensor | None,
    places: torch.Tensor | None,
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """The grid, operands and options of a launch over guides, if there are some, and keys."""
    (batch, kv_heads, keys, size), heads, per_head = key.shape, 0, 1
    strides: tuple[int, ...] = (0,) * 4
    if guides is not None:
        (heads, per_head), strides = guides.shape[2:4], guides.stride()[:4]
    operands = (
        key if guides is None else guides, key, units.origin, units.ranges if count is None else count,
        key if places is None else places,
        *strides, *key.stride()[:3], kv_heads, heads, per_head, keys,
    )  # fmt: skip
    options = {
        "PAGED": places is not None,
        "OF_SEGMENT": 0 if count is None else per_head // count.shape[-1],
        "D": size,
        "BLOCK_D": padded(size),
        "BLOCK_N": _ROWS,
        "num_warps": 4,
        "num_stages": 1,
    }
    return (heads * -(-per_head // _ROWS) + -(-keys // _ROWS), batch * kv_heads), operands, options


@kernel
def origin_kernel(
    origin, ranges, key, places, key_stride_b, key_stride_h, key_stride_n, kv_heads, keys, step,
    PAGED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the mean of every `step`-th key: `origin` [B, Hkv, D]; and zeros to `ranges` [2, B, Hkv].

    Program (batch entry and KV head).
    """
    place = tl.program_id(0)
    key += (place // kv_heads).to(tl.int64) * key_stride_b + (place % kv_heads).to(tl.int64) * key_stride_h
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N * step):
        position = start + tl.arange(0, BLOCK_N) * step
        row = rows_at(places, position, position < keys, PAGED)
        total += load_rows(key, row, position < keys, key_stride_n, D, BLOCK_D).to(tl.float32)
    mean = tl.sum(total, 0) / ((keys + step - 1) // step).to(tl.float32)
    channel = tl.arange(0, BLOCK_D)
    tl.store(origin + place * D + channel, mean.to(origin.dtype.element_ty), mask=channel < D)
    tl.store(ranges + place, 0.0)
    tl.store(ranges + tl.num_programs(0) + place, 0.0)


@triton.jit
def _place(count, heads, per_head, keys, OF_SEGMENT: tl.constexpr, BLOCK_N: tl.constexpr):
    """A program's head, where keys are one more head after the guides'; its rows [BLOCK_N]; and which are real.

    Of OF_SEGMENT guides of a segment those are before its `count` [B, Hkv, heads, segments]; all, if OF_SEGMENT is 0.
    """
    blocks = (per_head + BLOCK_N - 1) // BLOCK_N
    head = tl.minimum(tl.program_id(0) // blocks, heads)
    row = (tl.program_id(0) - head * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    real = row < tl.where(head < heads, per_head, keys)
    if OF_SEGMENT > 0:
        count += (tl.program_id(1) * heads + head) * (per_head // OF_SEGMENT)
        is_guide = row < tl.where(head < heads, per_head, 0)
        real = real & (row % OF_SEGMENT < tl.load(count + row // OF_SEGMENT, mask=is_guide, other=OF_SEGMENT))
    return head, row, real


@triton.jit
def _load(
    guides, key, origin, places, guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n,
    key_stride_b, key_stride_h, key_stride_n, kv_heads, heads, place,
    PAGED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The guides, or keys from `origin` [B, Hkv, D], at a `_place`: float32, zeros where there are none."""
    head, row, real = place
    batch, kv_head = (tl.program_id(1) // kv_heads).to(tl.int64), (tl.program_id(1) % kv_heads).to(tl.int64)
    if head < heads:
        guides += batch * guides_stride_b + kv_head * guides_stride_kv + head.to(tl.int64) * guides_stride_h
        rows = load_rows(guides, row, real, guides_stride_n, D, BLOCK_D).to(tl.float32)
    else:
        key += batch * key_stride_b + kv_head * key_stride_h
        channel = tl.arange(0, BLOCK_D)
        centre = tl.load(origin + tl.program_id(1) * D + channel, mask=channel < D, other=0.0).to(tl.float32)
        rows = load_rows(key, rows_at(places, row, real, PAGED), real, key_stride_n, D, BLOCK_D).to(tl.float32)
        rows = tl.where(real[:, None], rows - centre[None, :], 0.0)
    return rows


@triton.jit
def _round_up(reach):
    """The bits of the least FLOAT8_REACH, 1.75 * 8, times a power of two that is not below a number, given its bits."""
    return ((reach + 0x1FFFFF) & 0x7F800000) | 0x600000


@triton.jit
def raise_range(reach, furthest):
    """Raise a range to the magnitude whose bits are `furthest`, rounded up; NaN for infinity.

    Magnitudes have the order of their bits, with infinity and NaN above all.
    """
    furthest = tl.where(furthest < INFINITY, _round_up(furthest), NAN)
    tl.atomic_max(reach.to(tl.pointer_type(tl.int32), bitcast=True), furthest, sem="relaxed")


@triton.jit
def float8_unit(reach):
    """The factor of what reaches up to `reach`, in float8."""
    return FLOAT8_REACH / tl.maximum(tl.load(reach), 1e-30)


@triton.jit
def picking(picked, dtype: tl.constexpr, BLOCK_D: tl.constexpr, PICKED: tl.constexpr, BLOCK_P: tl.constexpr):
    """Ones [BLOCK_D, BLOCK_P] by which a product picks channels `picked` [PICKED].

    It copies numbers as they are, much faster than loads from scattered places.
    """
    column = tl.arange(0, BLOCK_P)
    wanted = tl.load(picked + column, mask=column < PICKED, other=-1)
    return (tl.arange(0, BLOCK_D)[:, None] == wanted[None, :]).to(tl.float32).to(dtype)


@triton.jit
def digit_unit(digit):
    """The unit of a digit: 128, then a sixteenth of the one before, of which rounding leaves no more."""
    return tl.exp2(7.0 - 4.0 * digit)


@triton.jit
def store_rows(rows, result, place, real, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write rows [N, BLOCK_D] to the `real` places [N] of `result` [..., D]."""
    channel = tl.arange(0, BLOCK_D)
    pointers = result + place[:, None] * D + channel[None, :]
    tl.store(pointers, rows.to(result.dtype.element_ty), mask=real[:, None] & (channel < D)[None, :])


@kernel
def reach_kernel(
    ranges, guides, key, origin, count, places,
    guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n, key_stride_b, key_stride_h, key_stride_n,
    kv_heads, heads, per_head, keys,
    PAGED: tl.constexpr, OF_SEGMENT: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Raise `ranges` [2, B, Hkv] to the reach of guides and of keys from `origin`, NaN for infinity.

    Program (block of guides or of keys; batch entry and KV head).
    """
    place = _place(count, heads, per_head, keys, OF_SEGMENT, BLOCK_N)
    rows = _load(
        guides, key, origin, places, guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n,
        key_stride_b, key_stride_h, key_stride_n, kv_heads, heads, place, PAGED, D, BLOCK_D,
    )  # fmt: skip
    furthest = tl.max(tl.max(tl.abs(rows).to(tl.int32, bitcast=True), 1), 0)
    raise_range(ranges + (place[0] == heads).to(tl.int32) * tl.num_programs(1) + tl.program_id(1), furthest)


@kernel
def quantise_kernel(
    ranges, result, of_picked, picked, guides, key, origin, count, places,
    guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n, key_stride_b, key_stride_h, key_stride_n,
    kv_heads, heads, per_head, keys,
    PICKED: tl.constexpr, WIDTH: tl.constexpr, PAGED: tl.constexpr, OF_SEGMENT: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write guides of all heads, then keys from `origin`, in units of range / FLOAT8_REACH: [B, Hkv, rows, D].

    The same of the channels `picked` [B, Hkv, PICKED]: `of_picked` [B, Hkv, rows, WIDTH], where PICKED is not 0, and
    digits behind them.
    Program (block of guides or of keys; batch entry and KV head).
    """
    place = _place(count, heads, per_head, keys, OF_SEGMENT, BLOCK_N)
    head, row, real = place
    ranges += (head == heads).to(tl.int32) * tl.num_programs(1) + tl.program_id(1)
    row += tl.program_id(1).to(tl.int64) * (heads * per_head + keys) + head * per_head
    rows = _load(
        guides, key, origin, places, guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n,
        key_stride_b, key_stride_h, key_stride_n, kv_heads, heads, place, PAGED, D, BLOCK_D,
    )  # fmt: skip
    rows = (rows * float8_unit(ranges)).to(tl.float8e4nv)
    store_rows(rows, result, row, real, D, BLOCK_D)
    if PICKED > 0:
        ones = picking(picked + tl.program_id(1) * PICKED, tl.float8e4nv, BLOCK_D, PICKED, BLOCK_P)
        product = tl.dot(rows, ones)
        if WIDTH > PICKED:
            digit = tl.arange(0, BLOCK_P) - PICKED
            product = tl.where((digit >= 0)[None, :], digit_unit(tl.maximum(digit, 0))[None, :], product)
        store_rows(product, of_picked, row, real, WIDTH, BLOCK_P)
