"""Functions that kernels share: spans, masks, gathers of rows, and logits, which are in units of log 2."""

from __future__ import annotations

import triton
import triton.language as tl

from ..rule import sampling, softmax

LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)
FLOAT8_REACH = tl.constexpr(14.0)
"""Largest number in float8 operands: sums over 256 products stay within half precision."""
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
KEY_BLOCK = tl.constexpr(64)
FIRST_KEYS = tl.constexpr(1)
"""Keys at the start that are always visited."""
FLAGS_PER_WORD = tl.constexpr(16)
"""Keys whose flags are the bits of one int16."""
NO_KEY = tl.constexpr(2**31 - 1)
"""A position past all keys."""
LEAST_SOFTCAP = tl.constexpr(softmax.LEAST_SOFTCAP)
KEY_STEP = tl.constexpr(sampling.KEY_STEP)
SEGMENT_STEP = tl.constexpr(sampling.SEGMENT_STEP)


@triton.jit
def float32(number):
    """A floating argument as float32: Inductor passes them as float64."""
    return tl.full([], number, tl.float32)


@triton.jit
def round_up(count, multiple):
    """`geometry.round_up`."""
    return (count + multiple - 1) // multiple * multiple


@triton.jit
def clip(key, keys):
    return tl.maximum(0, tl.minimum(key, keys))


@triton.jit
def span(
    segment, queries, keys, offset, window, near_keys, ranked_segments,
    SEGMENT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """`Geometry.span`: where a segment's history starts, and its dense span [low, high); of one segment or of many."""
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, queries)
    start = first * 0
    if WINDOW:
        start = clip(first + offset - window + 1, keys) // KEY_BLOCK * KEY_BLOCK
    low = tl.maximum(start, clip(first + offset - near_keys, keys) // KEY_BLOCK * KEY_BLOCK)
    high = clip(round_up(clip(end + offset + near_keys, keys), KEY_BLOCK), keys)
    is_ranked = segment < ranked_segments
    low = tl.where(is_ranked, low, start)
    high = tl.where(is_ranked, high, keys)
    if CAUSAL:
        high = clip(end + offset, keys)
    return start, low, tl.maximum(low, high)


@triton.jit
def place_list(
    first_segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """The segment of a program (segment, list of all batch entries and KV heads), its list, and where its keys lie.

    Those are from a first one to an end; without a causal mask the dense span's are among them, never to be listed.
    """
    segment = first_segment + tl.num_programs(0) - 1 - tl.program_id(0)
    place = (tl.program_id(1) * tl.num_programs(0) + segment - first_segment).to(tl.int64)
    begin, low, _ = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    end = low if CAUSAL else tl.where(segment < ranked_segments, keys, low)
    return segment, place, begin, end


@triton.jit
def mask_terms(
    batch, offset, window, query_documents, query_documents_stride_b, key_documents, key_documents_stride_b,
    mask, mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
):  # fmt: skip
    """The terms that `see` reads, of one batch entry."""
    query_documents += batch * query_documents_stride_b
    key_documents += batch * key_documents_stride_b
    mask += batch * mask_stride_b
    return offset, window, query_documents, key_documents, mask, mask_stride_h, mask_stride_n, mask_stride_k


@triton.jit
def see(
    terms, head, row, real, column, inside, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """`Visibility.seen` but for padding: the keys `column` [N] `inside` that `real` rows [M] see, [M or 1, N].

    `terms` are the offset, the window, the documents of queries and keys, the mask and its strides over heads, queries
    and keys, all of one batch entry. `head` [M] are query heads.
    """
    offset, window, query_documents, key_documents, mask, stride_h, stride_n, stride_k = terms
    seen = inside[None, :]
    if CAUSAL:
        # One comparison for both.
        seen = tl.where(inside, column, NO_KEY)[None, :] <= row[:, None] + offset
    if WINDOW:
        seen = seen & (column[None, :] > row[:, None] + (offset - window))
    if DOCUMENTS:
        of_row = tl.load(query_documents + row, mask=real, other=0)
        seen = seen & (of_row[:, None] == tl.load(key_documents + column, mask=inside, other=0)[None, :])
    if MASK:
        seen = seen & real[:, None]
        pointers = mask + head.to(tl.int64)[:, None] * stride_h + row.to(tl.int64)[:, None] * stride_n
        seen = seen & (tl.load(pointers + column.to(tl.int64)[None, :] * stride_k, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _reciprocal(x):
    """1 / x of numbers between 1 and 2, for which a division would first choose a scale."""
    if INTERPRETED:
        result = 1 / x
    else:
        result = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def fast_log2(x):
    """log2(x) to about 22 bits."""
    if INTERPRETED:
        result = tl.log2(x)
    else:
        result = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=r,r", [x], tl.float32, is_pure=True, pack=1)
    return result


@triton.jit
def cap(logits, softcap):
    """`softcap` * tanh(logits / `softcap`)."""
    size = tl.abs(logits)
    ratio = size * (1 / tl.maximum(softcap, LEAST_SOFTCAP))
    decay = tl.exp2(ratio * (-2 * LOG2_E))
    # Of small ratios the difference from 1 would have few digits, and under a large cap none.
    series = size - size * (ratio * ratio * (1 / 3))
    capped = tl.where(ratio < 0.03125, series, (softcap - softcap * decay) * _reciprocal(1 + decay))
    return tl.where(logits < 0, -capped, capped)


@triton.jit
def dot_logits(one, other, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """The logits of one [M, D] and other [D, N], capped to `softcap`, which is in units of log 2 as well."""
    logits = tl.dot(one, other, input_precision=PRECISION) * scale
    return cap(logits, softcap) if SOFTCAP else logits


@triton.jit
def place_guides(segment, slot, per_head, HEADS: tl.constexpr, PER_SEGMENT: tl.constexpr):
    """The guides at `slot` [M] of each row's segment: heads, places, and which are real."""
    head, guide = slot // PER_SEGMENT, segment * PER_SEGMENT + slot % PER_SEGMENT
    return head, guide, (head < HEADS) & (guide < per_head)


@triton.jit
def load_guides(guides, head, guide, real, stride_h, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows [M, BLOCK_D] of guides."""
    channels = tl.arange(0, BLOCK_D)
    pointers = guides + head.to(tl.int64)[:, None] * stride_h + guide.to(tl.int64)[:, None] * stride_n
    return tl.load(pointers + channels[None, :], mask=real[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def unit_scale(scale, ranges, place, places, QUANTISED: tl.constexpr):
    """The factor that turns products into logits, for the batch entry and KV head at `place` of `places`."""
    scale = float32(scale)
    if QUANTISED:
        scale *= tl.load(ranges + place) / FLOAT8_REACH * (tl.load(ranges + places + place) / FLOAT8_REACH)
    return scale


@triton.jit
def pack_halves(first, second):
    """Two numbers in half precision as the bits of one int32, the first one low."""
    if INTERPRETED:
        low = first.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        pair = second.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16 | low
    else:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [first, second], dtype=tl.int32, is_pure=True, pack=1
        )
    return pair


@triton.jit
def in_pairs(numbers):
    """Numbers [M, N] in half precision, kept two columns to a register, where maxima take both at once."""
    if INTERPRETED:
        result = numbers
    else:
        result = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [numbers], dtype=tl.float16, is_pure=True, pack=2)
    return result


@triton.jit
def scale_and_add(numbers, scale, addends):
    """`numbers` [M, N] * scale + addends in half precision, two columns in each instruction.

    `scale` and `addends` [N] are pairs (`pack_halves`): of the scale twice, and of those of columns 2n and 2n + 1 in
    both of these columns.
    """
    if INTERPRETED:
        lifted = addends << tl.where(tl.arange(0, addends.shape[0]) % 2 == 0, 16, 0) >> 16
        result = numbers * (scale << 16 >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        result += lifted.to(tl.int16).to(tl.float16, bitcast=True)[None, :]
    else:
        result = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $4;", "=r,r,r,r,r,r", [numbers, scale, addends[None, :]],
            dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return result


@triton.jit
def draws(keys, segment):
    """`sampling.draws`: numbers between 0 and 1 for key positions [N] and a segment."""
    bits = keys.to(tl.uint32) * KEY_STEP + (tl.zeros_like(keys) + segment).to(tl.uint32) * SEGMENT_STEP
    # The fraction of a number between 1 and 2: to make a float of an integer takes longer.
    return (bits >> 9 | 0x3F800000).to(tl.float32, bitcast=True) - (1 - 2.0**-24)


@triton.jit
def rows_at(rows, positions, inside, PAGED: tl.constexpr):
    """The rows of keys at positions `inside`: if PAGED as `rows` [Lk] says, else the positions."""
    return tl.load(rows + positions, mask=inside, other=0) if PAGED else positions


@triton.jit
def load_rows(base, rows, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [N, BLOCK_D] of a matrix, zeros where not `inside` (None where all are) and past channel D."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    if inside is None and D == BLOCK_D:
        block = tl.load(pointers)
    elif inside is None:
        block = tl.load(pointers, mask=(channels < D)[None, :], other=0.0)
    else:
        block = tl.load(pointers, mask=inside[:, None] & (channels < D)[None, :], other=0.0)
    return block


@triton.jit
def load_padding(padding, keys, inside, HAS_PADDING: tl.constexpr):
    """`inside`, without the keys that are padding."""
    if HAS_PADDING:
        inside = inside & (tl.load(padding + keys, mask=inside, other=0) != 0)
    return inside


@triton.jit
def finite_or_zero(maximum):
    """The origin of exponents: the running maximum, or 0 before the first key."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
