"""The keys whose importance reaches the threshold or their draw below it, appended to one list per segment."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .helpers import KEY_BLOCK, LOWEST, dot_logits, draws, float32, load_padding, load_rows, see, span


@triton.jit
def _larger(one, other):
    """The larger, or NaN where either is."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load_guides(guides, lse, row, real, segment, stride_h, stride_n, per_head, PER_SEGMENT, D, BLOCK_D):
    head, guide = row // PER_SEGMENT, segment * PER_SEGMENT + row % PER_SEGMENT
    channels = tl.arange(0, BLOCK_D)
    pointers = guides + head.to(tl.int64)[:, None] * stride_h + guide.to(tl.int64)[:, None] * stride_n
    rows = tl.load(pointers + channels[None, :], mask=real[:, None] & (channels < D)[None, :], other=0.0)
    return rows, tl.load(lse + head.to(tl.int64) * per_head + guide, mask=real, other=float("inf"))


@triton.jit
def select_kernel(
    guides,
    lse,
    key,
    padding,
    query_documents,
    key_documents,
    mask,
    index,
    log_weight,
    count,
    skipped,
    guides_stride_b,
    guides_stride_g,
    guides_stride_h,
    guides_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    padding_stride_b,
    query_documents_stride_b,
    key_documents_stride_b,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_k,
    groups,
    queries,
    keys,
    guides_per_head,
    first_segment,
    ranked_segments,
    offset,
    window,
    near_keys,
    first_keys,
    capacity,
    blocks,
    log2_threshold,
    log2_max_weight,
    mean_weight,
    scale,
    softcap,
    SEGMENT: tl.constexpr,
    POOL: tl.constexpr,
    GUIDE_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    SAMPLED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write one list: its keys, how many, and how many keys of each block are not in it.

    Lists stand in the order [batch, group, list, segment]: index [lists, capacity], log_weight (in units of log 2,
    where SAMPLED) likewise, count [lists], skipped [lists, blocks]. Program (segment, list of the group, batch entry
    and group).
    """
    scale, softcap, log2_threshold = float32(scale), float32(softcap), float32(log2_threshold)
    log2_max_weight, mean_weight = float32(log2_max_weight), float32(mean_weight)
    segment = first_segment + tl.program_id(0)
    batch = (tl.program_id(2) // groups).to(tl.int64)
    group = (tl.program_id(2) % groups).to(tl.int64)
    per_segment: tl.constexpr = SEGMENT // POOL
    heads: tl.constexpr = GUIDE_HEADS // LISTS
    total: tl.constexpr = heads * per_segment
    place = ((tl.program_id(2) * LISTS + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    index += place * capacity
    log_weight += place * capacity
    skipped += place * blocks
    first_head = tl.program_id(1) * heads
    guides += batch * guides_stride_b + group * guides_stride_g + first_head.to(tl.int64) * guides_stride_h
    lse += ((batch * groups + group) * GUIDE_HEADS + first_head) * guides_per_head
    key += batch * key_stride_b + group * key_stride_h
    padding += batch * padding_stride_b
    terms = (
        offset,
        window,
        query_documents + batch * query_documents_stride_b,
        key_documents + batch * key_documents_stride_b,
        mask + batch * mask_stride_b,
        mask_stride_h,
        mask_stride_n,
        mask_stride_k,
    )
    first_head += group * GUIDE_HEADS
    begin, low, high = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    end = low if CAUSAL else tl.where(segment < ranked_segments, keys, low)
    present = tl.minimum(guides_per_head - segment * per_segment, per_segment)

    row = tl.arange(0, BLOCK_M)
    real = (row < total) & (row % per_segment < present)
    rows, normaliser = _load_guides(
        guides,
        lse,
        row,
        real,
        segment,
        guides_stride_h,
        guides_stride_n,
        guides_per_head,
        per_segment,
        D,
        BLOCK_D,
    )
    # Where a guide tells nothing, every key is visited. A key that is NaN gives NaN for all guides, so for the largest.
    blind = tl.sum((normaliser != normaliser).to(tl.int32), 0)
    listed = 0
    varies: tl.constexpr = WINDOW or DOCUMENTS or MASK
    for start in range(begin, end, KEY_BLOCK):
        column = start + tl.arange(0, KEY_BLOCK)
        inside = (column < end) & ((column < low) | (column >= high))
        inside = load_padding(padding, column, inside, HAS_PADDING)
        block = tl.trans(load_rows(key, column, inside, key_stride_n, D, BLOCK_D))
        largest = tl.full([KEY_BLOCK], float("-inf"), tl.float32)
        mean = tl.zeros([KEY_BLOCK], tl.float32)
        seen_by_any = tl.zeros([KEY_BLOCK], tl.int32)
        for first in tl.static_range(0, total, BLOCK_M):
            if total > BLOCK_M:
                row = first + tl.arange(0, BLOCK_M)
                real = (row < total) & (row % per_segment < present)
                rows, normaliser = _load_guides(
                    guides, lse, row, real, segment, guides_stride_h, guides_stride_n, guides_per_head,
                    per_segment, D, BLOCK_D,
                )  # fmt: skip
                blind += tl.sum((normaliser != normaliser).to(tl.int32), 0)
            logits = dot_logits(rows, block, scale, softcap, SOFTCAP, PRECISION) - normaliser[:, None]
            if varies:
                head, position = first_head + row // per_segment, segment * SEGMENT + row % per_segment * POOL
                seen = see(terms, head, position, real, column, inside, False, WINDOW, DOCUMENTS, MASK) & real[:, None]
                logits = tl.where(seen, logits, float("-inf"))
                seen_by_any = tl.maximum(seen_by_any, tl.max(seen.to(tl.int32), 0))
            largest = _larger(largest, tl.max(logits, 0))
            if HAS_MEAN:
                mean += tl.sum(tl.exp2(logits), 0)
        if varies:
            inside = inside & (seen_by_any > 0)
        importance = tl.full([KEY_BLOCK], float("-inf"), tl.float32)
        if HAS_MAX:
            importance = largest + log2_max_weight
        if HAS_MEAN:
            importance = _larger(importance, tl.log2(mean * mean_weight / (heads * present)))
        sure = (importance != importance) | (blind > 0) | (column < first_keys)
        importance = tl.where(sure, float("inf"), tl.maximum(importance, LOWEST))
        bar = log2_threshold + tl.zeros([KEY_BLOCK], tl.float32)
        if SAMPLED:
            bar += tl.log2(draws(column, segment))
        keep = inside & (importance >= bar)
        kept = keep.to(tl.int32)
        rank = listed + tl.cumsum(kept, 0) - kept
        tl.store(index + rank, column, mask=keep)
        if SAMPLED:
            tl.store(log_weight + rank, tl.maximum(log2_threshold - importance, 0.0), mask=keep)
        listed += tl.sum(kept, 0)
        tl.store(skipped + start // KEY_BLOCK, tl.sum(inside.to(tl.int32), 0) - tl.sum(kept, 0))
    tl.store(count + place, listed)
