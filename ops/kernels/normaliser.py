"""The log-sum-exp of each guide, estimated from its dense span and a sample of its history."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .helpers import dot_logits, finite_or_zero, float32, load_padding, load_rows, see, span


@triton.jit
def _add(maximum, mass, logits):
    largest = tl.maximum(maximum, tl.max(logits, 1))
    origin = finite_or_zero(largest)
    mass = mass * tl.exp2(maximum - origin) + tl.sum(tl.exp2(logits - origin[:, None]), 1)
    return largest, mass


@triton.jit
def normaliser_kernel(
    guides,
    key,
    padding,
    query_documents,
    key_documents,
    mask,
    lse,
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
    sample,
    log2_sample,
    scale,
    softcap,
    SEGMENT: tl.constexpr,
    POOL: tl.constexpr,
    GUIDE_HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write lse [B, groups, heads, guides], in units of log 2, for the guides of one segment of one KV group.

    Program (segment, block of the segment's guides over all heads, batch entry and group).
    """
    scale, softcap, log2_sample = float32(scale), float32(softcap), float32(log2_sample)
    segment = first_segment + tl.program_id(0)
    batch = (tl.program_id(2) // groups).to(tl.int64)
    group = (tl.program_id(2) % groups).to(tl.int64)
    per_segment: tl.constexpr = SEGMENT // POOL
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    head, guide = row // per_segment, segment * per_segment + row % per_segment
    real = (head < GUIDE_HEADS) & (guide < guides_per_head)
    guides += batch * guides_stride_b + group * guides_stride_g
    channels = tl.arange(0, BLOCK_D)
    pointers = guides + head.to(tl.int64)[:, None] * guides_stride_h + guide.to(tl.int64)[:, None] * guides_stride_n
    rows = tl.load(pointers + channels[None, :], mask=real[:, None] & (channels < D)[None, :], other=0.0)
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
    query_head, position = group * GUIDE_HEADS + head, guide * POOL
    begin, low, high = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    is_ranked = segment < ranked_segments
    end = low if CAUSAL else tl.where(is_ranked, keys, low)
    dense_end = tl.where(is_ranked, high, low)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)

    for start in range(begin // sample * sample + sample // 2, end, BLOCK_N * sample):
        column = start + tl.arange(0, BLOCK_N) * sample
        inside = (column < end) & (column >= first_keys) & ((column < low) | (column >= high))
        inside = load_padding(padding, column, inside, HAS_PADDING)
        block = load_rows(key, column, inside, key_stride_n, D, BLOCK_D)
        logits = dot_logits(rows, tl.trans(block), scale, softcap, SOFTCAP, PRECISION) + log2_sample
        seen = see(terms, query_head, position, real, column, inside, False, WINDOW, DOCUMENTS, MASK)
        maximum, mass = _add(maximum, mass, tl.where(seen, logits, float("-inf")))

    for start in range(begin, tl.minimum(first_keys, end), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = (column < first_keys) & (column < end) & ((column < low) | (column >= high))
        inside = load_padding(padding, column, inside, HAS_PADDING)
        block = load_rows(key, column, inside, key_stride_n, D, BLOCK_D)
        logits = dot_logits(rows, tl.trans(block), scale, softcap, SOFTCAP, PRECISION)
        seen = see(terms, query_head, position, real, column, inside, False, WINDOW, DOCUMENTS, MASK)
        maximum, mass = _add(maximum, mass, tl.where(seen, logits, float("-inf")))

    for start in range(low, dense_end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = load_padding(padding, column, column < high, HAS_PADDING)
        block = load_rows(key, column, inside, key_stride_n, D, BLOCK_D)
        logits = dot_logits(rows, tl.trans(block), scale, softcap, SOFTCAP, PRECISION)
        seen = see(terms, query_head, position, real, column, inside, CAUSAL, WINDOW, DOCUMENTS, MASK)
        maximum, mass = _add(maximum, mass, tl.where(seen, logits, float("-inf")))

    place = ((batch * groups + group) * GUIDE_HEADS + head) * guides_per_head + guide
    tl.store(lse + place, maximum + tl.log2(mass), mask=real)
