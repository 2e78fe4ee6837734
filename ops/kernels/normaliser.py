"""The log-sum-exp of each guide, estimated from its dense span and a sample of its history."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .arguments import Arguments
from .helpers import (
    FIRST_KEYS,
    NO_KEY,
    dot_logits,
    finite_or_zero,
    float32,
    load_guides,
    load_padding,
    load_rows,
    mask_terms,
    place_guides,
    see,
    span,
    unit_scale,
)
from .launch import launch
from .merge import MergedGuides
from .products import LANES
from .quantise import Operands
from .tiling import MERGED_ROWS, SHARED_REGISTERS, normaliser_tiling
from .variants import kernel


def normalisers(arguments: Arguments, operands: Operands, merged: MergedGuides | None) -> torch.Tensor:
    """The log-sum-exp of each guide [B, Hkv, guide heads, guides], float32, in units of log 2.

    Of all segments at once: those of a run are too few to fill a GPU. Undefined where there is no guide.
    """
    config, guides, key, segments = arguments.config, operands.guides, operands.key, arguments.geometry.segments
    lse = torch.empty(guides.shape[:-1], dtype=torch.float32, device=guides.device)
    total = guides.shape[2] * arguments.guides_of_segment
    tiling = normaliser_tiling(key.shape[-1], key.element_size(), total)
    together = tiling.segments(total if merged is None else min(total, MERGED_ROWS))
    of_merged = (lse, lse) if merged is None else (merged.counts, merged.first)
    grid = (-(-segments // together), -(-total * together // tiling.rows), arguments.batch_kv_heads)
    launch(
        normaliser_kernel, grid,
        guides, operands.ranges, key, *arguments.masks, *of_merged, lse,
        *guides.stride()[:4], *key.stride()[:3], *arguments.mask_strides,
        first_segment=0, segments=segments, sample=config.ranking.sample, log2_sample=math.log2(config.ranking.sample),
        SEGMENTS=together, PER_SEGMENT=arguments.guides_of_segment, ARE_MERGED=merged is not None,
        **arguments.shared, **operands.arguments, **tiling.arguments,
        **({"maxnreg": SHARED_REGISTERS} if operands.are_quantised else {}),
    )  # fmt: skip
    return lse


LARGEST = tl.constexpr(1e37)
"""Mass from which on a sum counts as overflowed."""
BELOW_LINE = tl.constexpr(0.0573)
"""By how much log2(1 + x) exceeds x on average, 0 < x < 1."""


@triton.jit
def by_lane(products):
    """Sums [M, LANES] of a product [M, N] over the columns of each thread of a row, which need not ask others.

    Of each 8 columns a thread holds the pair 2t and 2t + 1, t < 4.
    """
    columns = tl.reshape(products, [products.shape[0], products.shape[1] // (2 * LANES), LANES, 2])
    return tl.sum(tl.sum(columns, 3), 1)


@triton.jit
def rough_exp2(product, scale, origin):
    """2^(product * scale + origin), within 4%, right on average, 0 below 2^-126; without the few units for powers.

    The exponent and the fraction of the result are 8 and 13 bits of a sum with 1536 (Schraudolph, A Fast, Compact
    Approximation of the Exponential Function, 1999).
    """
    bits = product * scale + (origin + (1536 + 127 - BELOW_LINE))
    bits = tl.minimum(tl.maximum(bits, 1536.0), 1536 + 254.9375)
    return (bits.to(tl.int32, bitcast=True) << 10).to(tl.float32, bitcast=True)


@triton.jit
def _is_history(column, history, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Membership of the keys `column` [N] in the histories of rows: [M, N] boolean."""
    begin, low, high, end = history
    is_history = column[None, :] < end
    if WINDOW:
        is_history = is_history & (column[None, :] >= begin)
    if not CAUSAL:
        is_history = is_history & ((column[None, :] < low) | (column[None, :] >= high))
    return is_history


@triton.jit
def _start_of_sample(first, last, sample):
    """The first key that is drawn, one from the middle of every `sample`, of histories from `first` to `last`."""
    middle = sample // 2
    return tl.maximum(first // sample, (tl.minimum(FIRST_KEYS, last) + sample - 1 - middle) // sample) * sample + middle


@triton.jit
def _add(maximum, mass, logits):
    largest = tl.maximum(maximum, tl.max(logits, 1))
    origin = finite_or_zero(largest)
    mass = mass * tl.exp2(maximum - origin) + tl.sum(tl.exp2(logits - origin[:, None]), 1)
    return largest, mass


@triton.jit
def _sum_seen(
    rows, key, padding, terms, key_stride_n, scale, softcap, query_head, position, real, is_ranked,
    begin, low, high, end, keys, sample, log2_sample,
    CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The largest logit of each guide [M], and the sum of 2^(logit - largest) over keys that it sees, estimated."""
    first, last = tl.min(begin, 0), tl.max(end, 0)
    maximum = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    mass = tl.zeros([rows.shape[0]], tl.float32)
    history = (begin[:, None], low[:, None], high[:, None], end[:, None])
    rows_differ: tl.constexpr = WINDOW or DOCUMENTS or MASK
    for start in range(first, tl.minimum(FIRST_KEYS, last), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = load_padding(padding, column, (column < FIRST_KEYS) & (column < last), HAS_PADDING)
        block = load_rows(key, column, inside, key_stride_n, D, BLOCK_D)
        seen = _is_history(tl.where(inside, column, NO_KEY), history, CAUSAL, WINDOW)
        if rows_differ:
            seen = seen & see(terms, query_head, position, real, column, inside, False, WINDOW, DOCUMENTS, MASK)
        logits = dot_logits(rows, tl.trans(block), scale, softcap, SOFTCAP, PRECISION)
        maximum, mass = _add(maximum, mass, tl.where(seen, logits, float("-inf")))

    end_of_dense = tl.max(high, 0)
    for start in range(tl.min(tl.where(is_ranked, low, keys), 0), end_of_dense, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = load_padding(padding, column, column < end_of_dense, HAS_PADDING)
        block = load_rows(key, column, inside, key_stride_n, D, BLOCK_D)
        seen = see(terms, query_head, position, real, column, inside, CAUSAL, WINDOW, DOCUMENTS, MASK)
        seen = seen & (column[None, :] >= low[:, None])
        if not CAUSAL:
            seen = seen & (column[None, :] < high[:, None])
        logits = dot_logits(rows, tl.trans(block), scale, softcap, SOFTCAP, PRECISION)
        maximum, mass = _add(maximum, mass, tl.where(seen, logits, float("-inf")))

    for start in range(_start_of_sample(first, last, sample), last, BLOCK_N * sample):
        column = start + tl.arange(0, BLOCK_N) * sample
        inside = load_padding(padding, column, column < last, HAS_PADDING)
        block = load_rows(key, column, inside, key_stride_n, D, BLOCK_D)
        if HAS_PADDING:
            column = tl.where(inside, column, NO_KEY)
        logits = dot_logits(rows, tl.trans(block), scale, softcap, SOFTCAP, PRECISION) + log2_sample
        seen = _is_history(column, history, CAUSAL, WINDOW)
        if rows_differ:
            seen = seen & see(terms, query_head, position, real, column, inside, False, WINDOW, DOCUMENTS, MASK)
        maximum, mass = _add(maximum, mass, tl.where(seen, logits, float("-inf")))
    return maximum, mass


@triton.jit
def _add_by_lane(maximum, mass, logits):
    """`_add` for the columns of each thread of a row: `maximum` and `mass` [M, LANES]."""
    columns = tl.reshape(logits, [logits.shape[0], logits.shape[1] // (2 * LANES), LANES, 2])
    largest = tl.maximum(maximum, tl.max(tl.max(columns, 3), 1))
    origin = finite_or_zero(largest)
    shares = tl.exp2(columns - origin[:, None, :, None])
    return largest, mass * tl.exp2(maximum - origin) + tl.sum(tl.sum(shares, 3), 1)


@triton.jit
def _sum_past(
    rows, key, key_stride_n, scale, low, reach, end, real, keys, sample, log2_sample,
    ROUGH: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_sum_seen` where guides see all keys before their `reach` [M], and the largest logit is that of dense spans.

    The sum may overflow, if others are far above these. With ROUGH, as float8 is, half of the powers are rough.
    """
    last = tl.max(end, 0)
    column = tl.arange(0, BLOCK_N)
    block = load_rows(key, column, column < FIRST_KEYS, key_stride_n, D, BLOCK_D)
    first = tl.sum(tl.dot(rows, tl.trans(block), input_precision=PRECISION) * scale, 1)
    first = tl.where(end > 0, first, float("-inf"))
    maximum = tl.full([rows.shape[0], LANES], float("-inf"), tl.float32)
    mass = tl.zeros([rows.shape[0], LANES], tl.float32)
    end_of_dense, width = tl.max(reach, 0), tl.maximum(reach - low, 0).to(tl.uint32, bitcast=True)
    for start in range(tl.min(tl.where(reach > low, low, keys), 0), end_of_dense, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        block = load_rows(key, column, column < end_of_dense, key_stride_n, D, BLOCK_D)
        logits = tl.dot(rows, tl.trans(block), input_precision=PRECISION) * scale
        # One comparison for both bounds: what lies before `low` is large.
        seen = (column[None, :] - low[:, None]).to(tl.uint32, bitcast=True) < width[:, None]
        maximum, mass = _add_by_lane(maximum, mass, tl.where(seen, logits, float("-inf")))
    origin = finite_or_zero(tl.maximum(first, tl.max(maximum, 1)))

    # The history in units of what there is so far.
    start_of_sample = _start_of_sample(0, last, sample)
    # Blocks before the end of every history have nothing to mask.
    whole = tl.min(tl.where(real, end, keys), 0)
    step = 2 * BLOCK_N * sample
    end_of_whole = start_of_sample + tl.maximum(whole - start_of_sample + sample - 1, 0) // step * step
    shift = (log2_sample - origin)[:, None]
    place = tl.arange(0, BLOCK_N) * sample
    drawn = tl.zeros([rows.shape[0], LANES], tl.float32)
    for start in range(start_of_sample, end_of_whole, step):
        one = load_rows(key, start + place, None, key_stride_n, D, BLOCK_D)
        two = load_rows(key, start + step // 2 + place, None, key_stride_n, D, BLOCK_D)
        one = tl.dot(rows, tl.trans(one), input_precision=PRECISION)
        two = tl.dot(rows, tl.trans(two), input_precision=PRECISION)
        drawn += by_lane(tl.exp2(one * scale + shift))
        drawn += by_lane(rough_exp2(two, scale, shift) if ROUGH else tl.exp2(two * scale + shift))
    for start in range(end_of_whole, last, BLOCK_N * sample):
        column = start + tl.arange(0, BLOCK_N) * sample
        block = load_rows(key, column, column < last, key_stride_n, D, BLOCK_D)
        share = tl.exp2(tl.dot(rows, tl.trans(block), input_precision=PRECISION) * scale + shift)
        drawn += by_lane(tl.where(column[None, :] < end[:, None], share, 0.0))
    mass = mass * tl.exp2(maximum - origin[:, None]) + drawn
    return origin, tl.sum(mass, 1) + tl.exp2(first - origin)


@kernel
def normaliser_kernel(
    guides, ranges, key, padding, query_documents, key_documents, mask, count, first_row, lse,
    guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n, key_stride_b, key_stride_h, key_stride_n,
    padding_stride_b, query_documents_stride_b, key_documents_stride_b,
    mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    kv_heads, queries, keys, guides_per_head, first_segment, segments, ranked_segments, offset, window, near_keys,
    sample, log2_sample, scale, softcap,
    SEGMENT: tl.constexpr, POOL: tl.constexpr, GUIDE_HEADS: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, SEGMENTS: tl.constexpr, PER_SEGMENT: tl.constexpr, ARE_MERGED: tl.constexpr,
    QUANTISED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write log-sum-exps [B, Hkv, guide heads, guides], in units of log 2, of the guides of some segments.

    Program (SEGMENTS consecutive segments, last first; block of the guides of each over all heads; batch entry and KV
    head).
    """
    softcap, log2_sample = float32(softcap), float32(log2_sample)
    scale = unit_scale(scale, ranges, tl.program_id(2), tl.num_programs(2), QUANTISED)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    rows_per_segment: tl.constexpr = BLOCK_M // SEGMENTS
    guides += batch * guides_stride_b + kv_head * guides_stride_kv
    first_guide = (batch * kv_heads + kv_head) * GUIDE_HEADS * guides_per_head
    key += batch * key_stride_b + kv_head * key_stride_h
    padding += batch * padding_stride_b
    terms = mask_terms(
        batch, offset, window, query_documents, query_documents_stride_b, key_documents, key_documents_stride_b,
        mask, mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    )  # fmt: skip

    row = tl.arange(0, BLOCK_M)
    part = tl.num_programs(0) - 1 - tl.program_id(0)
    segment = first_segment + part * SEGMENTS + row // rows_per_segment
    slot = tl.program_id(1) * rows_per_segment + row % rows_per_segment
    head, guide, real = place_guides(segment, slot, guides_per_head, GUIDE_HEADS, PER_SEGMENT)
    if ARE_MERGED:
        of_list = (first_guide + head * guides_per_head) // PER_SEGMENT + segment
        real = real & (slot % PER_SEGMENT < tl.load(count + of_list, mask=real, other=0))
        if tl.max(real.to(tl.int32), 0) == 0:
            return
    rows = load_guides(guides, head, guide, real, guides_stride_h, guides_stride_n, D, BLOCK_D)
    real = real & (segment < first_segment + segments)
    query_head, position = kv_head * GUIDE_HEADS + head, guide * POOL
    if ARE_MERGED:
        position = tl.load(first_row + first_guide + head.to(tl.int64) * guides_per_head + guide, mask=real, other=0)
    begin, low, high = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    is_ranked = (segment < ranked_segments) & real
    end = tl.where(is_ranked, low if CAUSAL else keys, begin)
    high = tl.where(is_ranked, high, low)
    if CAUSAL and not (WINDOW or DOCUMENTS or MASK or HAS_PADDING or SOFTCAP):
        reach = tl.minimum(position + offset + 1, high)
        maximum, mass = _sum_past(
            rows, key, key_stride_n, scale, low, reach, end, real, keys, sample, log2_sample,
            QUANTISED, D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        if tl.max((real & (mass >= LARGEST)).to(tl.int32), 0) == 1:
            maximum, mass = _sum_seen(
                rows, key, padding, terms, key_stride_n, scale, softcap, query_head, position, real, is_ranked,
                begin, low, high, end, keys, sample, log2_sample,
                CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, MASK, SOFTCAP, D, BLOCK_N, BLOCK_D, PRECISION,
            )  # fmt: skip
    else:
        maximum, mass = _sum_seen(
            rows, key, padding, terms, key_stride_n, scale, softcap, query_head, position, real, is_ranked,
            begin, low, high, end, keys, sample, log2_sample,
            CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, MASK, SOFTCAP, D, BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
    place = first_guide + head.to(tl.int64) * guides_per_head + guide
    tl.store(lse + place, maximum + tl.log2(mass), mask=real)
