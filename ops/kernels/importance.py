"""The importance of each key of a history, or whether it reaches the threshold, for each list of keys."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from ..projection import MOST_NEGLECTED as MOST
from .helpers import (
    FLAGS,
    KEY_BLOCK,
    LOG2_E,
    dot_logits,
    float32,
    load_guides,
    load_padding,
    load_rows,
    mask_terms,
    pack_halves,
    place_guides,
    scale_and_add,
    see,
    span,
    unit_scale,
)

MOST_NEGLECTED = tl.constexpr(MOST)
LANES = tl.constexpr(4)
"""Threads that share a row of a product."""


@triton.jit
def _larger(one, other):
    """The larger, or NaN where either is."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _place_rows(row, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr):
    """The segment and the guide of each row of a part, which has as many guides of each of SEGMENTS segments.

    Of each 8 columns of a product a thread holds the pair 2t and 2t + 1, t < 4. Pairs of guides of BESIDE segments
    stand side by side: with 4, a thread holds the guides of its segments, and reduces them without asking others.
    """
    guides: tl.constexpr = row.shape[0] // SEGMENTS
    beside: tl.constexpr = SEGMENTS if SEGMENTS < BESIDE else BESIDE
    together: tl.constexpr = guides if guides < 2 else 2
    block, lane = row // (beside * together), row // together % beside
    pairs: tl.constexpr = guides // together
    return block // pairs * beside + lane, block % pairs * together + row % together


@triton.jit
def _by_segment(products, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr):
    """What stands at the rows of a part [N, SEGMENTS * guides] as [N, SEGMENTS, guides]."""
    guides: tl.constexpr = products.shape[1] // SEGMENTS
    beside: tl.constexpr = SEGMENTS if SEGMENTS < BESIDE else BESIDE
    together: tl.constexpr = guides if guides < 2 else 2
    shape: tl.constexpr = [products.shape[0], SEGMENTS // beside, guides // together, beside, together]
    products = tl.reshape(products, shape)
    return tl.reshape(tl.permute(products, (0, 1, 3, 2, 4)), [products.shape[0], SEGMENTS, guides])


@triton.jit
def _pack(flags):
    """Flags [N, SEGMENTS] as bits of int16 [N / 16, SEGMENTS], the first of each 16 low.

    A warp holds 16 rows of a product, so bits stay within it.
    """
    bit = 1 << tl.arange(0, flags.shape[0]) % FLAGS
    bits = tl.where(flags, bit[:, None], 0)
    return tl.sum(tl.reshape(bits, [flags.shape[0] // FLAGS, FLAGS, flags.shape[1]]), 1).to(tl.int16)


@triton.jit
def _load_part(
    guides, lse, raised, first, done, guides_per_head, stride_h, stride_n, HEADS: tl.constexpr,
    PER_SEGMENT: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """ROWS guides of each of SEGMENTS segments, `done` being those before: their channels, and their log-sum-exps.

    The latter negated and `raised`, and with HALF in pairs as `scale_and_add` takes them.
    """
    row = tl.arange(0, ROWS * SEGMENTS)
    segment, slot = _place_rows(row, SEGMENTS, BESIDE)
    head, guide, real = place_guides(first + segment, done + slot, guides_per_head, HEADS, PER_SEGMENT)
    rows = load_guides(guides, head, guide, real, stride_h, stride_n, D, BLOCK_D)
    if HALF:
        origin = pack_halves(
            raised + _origins(lse, row & -2, first, done, guides_per_head, HEADS, PER_SEGMENT, SEGMENTS, BESIDE),
            raised + _origins(lse, row | 1, first, done, guides_per_head, HEADS, PER_SEGMENT, SEGMENTS, BESIDE),
        )
    else:
        origin = raised + _origins(lse, row, first, done, guides_per_head, HEADS, PER_SEGMENT, SEGMENTS, BESIDE)
    return rows, origin


@triton.jit
def _origins(
    lse, row, first, done, guides_per_head, HEADS: tl.constexpr, PER_SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """The negated log-sum-exps at rows of a part, -inf where there is no guide."""
    segment, slot = _place_rows(row, SEGMENTS, BESIDE)
    head, guide, real = place_guides(first + segment, done + slot, guides_per_head, HEADS, PER_SEGMENT)
    return -tl.load(lse + head.to(tl.int64) * guides_per_head + guide, mask=real, other=float("inf"))


@triton.jit
def importance_kernel(
    guides,
    ranges,
    lse,
    key,
    distances,
    neglected,
    padding,
    query_documents,
    key_documents,
    mask,
    importance,
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
    segments,
    ranked_segments,
    offset,
    window,
    near_keys,
    first_keys,
    capacity,
    chunk,
    threshold,
    max_weight,
    mean_weight,
    scale,
    softcap,
    SEGMENT: tl.constexpr,
    POOL: tl.constexpr,
    GUIDE_HEADS: tl.constexpr,
    LISTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    QUANTISED: tl.constexpr,
    HALF: tl.constexpr,
    HAS_MAX: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    MEASURES_OUTPUT: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    CHOOSES: tl.constexpr,
    FEW: tl.constexpr,
    HOLDS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write importance [lists, capacity], in steps of `threshold`; NaN is sure to be visited, -1 is not to be visited.

    Where keys are not SAMPLED, all that is written is which of them reach the threshold, as the bits of int16
    [lists, capacity / 16], the first of each 16 keys low; and with HAS_LEFT, after them, which do not but are visible.
    With MEASURES_OUTPUT the shares of mass are multiplied by `distances` [B, groups, Lk]. With CHOOSES, FEW says that
    guides and keys lack channels, and only those groups are written for which that (or else its contrary) is right by
    what the others carry, `neglected` [B, groups]; importance makes up for it (`Projected.neglected`).
    The guides of a list are multiplied in parts, of BLOCK_M and a last one of BLOCK_REST where they are more than that;
    HOLDS says whether all are held, or loaded anew for each block of keys. HALF sums products in half precision.
    Lists stand in the order [batch, group, list, segment], keys from where the segment's history starts. Program
    (`chunk` keys for SEGMENTS consecutive segments, last first; list of the group; batch entry and group). Keys are the
    rows of the product, so that the maximum over guides stays within a warp.
    """
    raised = 0.0
    if CHOOSES:
        missing = tl.load(neglected + tl.program_id(2))
        lacks = (missing > MOST_NEGLECTED).to(tl.int32)
        if lacks == (1 if FEW else 0):
            return
        if FEW:
            raised = missing * LOG2_E
    softcap = float32(softcap)
    scale = unit_scale(scale, ranges, tl.program_id(2), tl.num_programs(2), QUANTISED)
    max_step, mean_step = float32(max_weight) / float32(threshold), float32(mean_weight) / float32(threshold)
    batch = (tl.program_id(2) // groups).to(tl.int64)
    group = (tl.program_id(2) % groups).to(tl.int64)
    per_segment: tl.constexpr = SEGMENT // POOL
    heads: tl.constexpr = GUIDE_HEADS // LISTS
    total: tl.constexpr = heads * per_segment
    of_part: tl.constexpr = BLOCK_M // SEGMENTS
    # With a mask, products are laid out as the mask is loaded, and reduced across warps. Triton's reduction is wrong
    # there if the lanes of its axis stand between those of another.
    beside: tl.constexpr = 1 if MASK else LANES
    first_head = tl.program_id(1) * heads
    guides += batch * guides_stride_b + group * guides_stride_g + first_head.to(tl.int64) * guides_stride_h
    first_guide = ((batch * groups + group) * GUIDE_HEADS + first_head) * guides_per_head
    lse += first_guide
    key += batch * key_stride_b + group * key_stride_h
    distances += tl.program_id(2).to(tl.int64) * keys
    padding += batch * padding_stride_b
    terms = mask_terms(
        batch, offset, window, query_documents, query_documents_stride_b, key_documents, key_documents_stride_b,
        mask, mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    )  # fmt: skip

    parts = (segments + SEGMENTS - 1) // SEGMENTS
    first = first_segment + (parts - 1 - tl.program_id(0) % parts) * SEGMENTS
    part = first + tl.arange(0, SEGMENTS)
    is_ranked = part < tl.minimum(ranked_segments, first_segment + segments)
    begin, low, high = span(part, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    end = tl.where(is_ranked, low if CAUSAL else keys, begin)
    present = tl.minimum(guides_per_head - part * per_segment, per_segment)
    place = (tl.program_id(2) * LISTS + tl.program_id(1)) * segments + part - first_segment
    lists = (tl.num_programs(2) * LISTS * segments).to(tl.int64)
    importance += (place.to(tl.int64) * capacity - begin) // (1 if SAMPLED else FLAGS)

    held = ()
    if HOLDS:
        for done in tl.static_range(0, total, of_part):
            held += (_load_part(
                guides, lse, raised, first, done, guides_per_head, guides_stride_h, guides_stride_n, heads, per_segment,
                of_part if done + of_part <= total or BLOCK_REST == 0 else BLOCK_REST, SEGMENTS, beside, D, BLOCK_D,
                HALF,
            ),)  # fmt: skip
    if HALF:
        scale = pack_halves(scale, scale)
    varies: tl.constexpr = WINDOW or DOCUMENTS or MASK
    # A reduction hides the alignment, without which keys are stored one by one.
    start_of_chunk = tl.min(begin // KEY_BLOCK, 0) * KEY_BLOCK + tl.program_id(0) // parts * chunk
    for start in range(start_of_chunk, tl.minimum(start_of_chunk + chunk, tl.max(end, 0)), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        block = load_rows(key, column, column < keys, key_stride_n, D, BLOCK_D)
        largest = tl.full([BLOCK_N, SEGMENTS], float("-inf"), tl.float16 if HALF else tl.float32)
        mean = tl.zeros([BLOCK_N, SEGMENTS], tl.float32)
        visible = tl.zeros([BLOCK_N, SEGMENTS], tl.int32)
        for done in tl.static_range(0, total, of_part):
            if HOLDS:
                rows, origin = held[done // of_part]
            else:
                rows, origin = _load_part(
                    guides, lse, raised, first, done, guides_per_head, guides_stride_h, guides_stride_n, heads,
                    per_segment, of_part if done + of_part <= total or BLOCK_REST == 0 else BLOCK_REST, SEGMENTS,
                    beside, D, BLOCK_D, HALF,
                )  # fmt: skip
            if HALF:
                logits = scale_and_add(tl.dot(block, tl.trans(rows), out_dtype=tl.float16), scale, origin)
            else:
                logits = dot_logits(block, tl.trans(rows), scale, softcap, SOFTCAP, PRECISION) + origin[None, :]
            if varies:
                segment, slot = _place_rows(tl.arange(0, rows.shape[0]), SEGMENTS, beside)
                head, guide, real = place_guides(first + segment, done + slot, guides_per_head, heads, per_segment)
                query_head, position = group * GUIDE_HEADS + first_head + head, guide * POOL
                seen = see(terms, query_head, position, real, column, column < keys, False, WINDOW, DOCUMENTS, MASK)
                seen = tl.trans(seen & real[:, None])
                logits = tl.where(seen, logits, float("-inf"))
                visible = tl.maximum(visible, tl.max(_by_segment(seen.to(tl.int32), SEGMENTS, beside), 2))
            of_segments = _by_segment(logits, SEGMENTS, beside)
            if HALF:
                largest = _larger(largest, tl.reduce(of_segments, 2, _larger))
            elif HAS_MAX:
                # A maximum over guides does not see the NaN of one that tells nothing.
                blind = _by_segment((origin != origin).to(tl.int32)[None, :], SEGMENTS, beside)
                blind = tl.where(tl.max(blind, 2) > 0, float("inf"), float("-inf"))
                largest = _larger(_larger(largest, blind), tl.max(of_segments, 2))
            if HAS_MEAN:
                mean += tl.sum(tl.exp2(of_segments), 2)
        score = mean * (mean_step / (heads * present))[None, :]
        if HAS_MAX:
            score = _larger(score, tl.exp2(largest.to(tl.float32)) * max_step)
        if MEASURES_OUTPUT:
            score *= tl.load(distances + column, mask=column < keys, other=1.0)[:, None]
        score += tl.where(column < first_keys, float("inf"), 0.0)[:, None]
        if HAS_PADDING:
            score = tl.where(load_padding(padding, column, column < keys, True)[:, None], score, -1.0)
        if not CAUSAL:
            score = tl.where((column[:, None] < low[None, :]) | (column[:, None] >= high[None, :]), score, -1.0)
        if varies:
            score = tl.where(visible > 0, score, -1.0)
        if SAMPLED:
            written = column[:, None] < end[None, :]
            if WINDOW:
                written = written & (column[:, None] >= begin[None, :])
            tl.store(importance[None, :] + column[:, None], score, mask=written)
        else:
            first_of_word = start + tl.arange(0, BLOCK_N // FLAGS) * FLAGS
            words = importance[None, :] + (first_of_word // FLAGS)[:, None]
            written = first_of_word[:, None] < end[None, :]
            if WINDOW:
                written = written & (first_of_word[:, None] >= begin[None, :])
            if not CAUSAL:
                score = tl.where((column < keys)[:, None], score, -1.0)
            below = score < 1.0
            tl.store(words, _pack(below == 0), mask=written)
            if HAS_LEFT:
                tl.store(words + lists * (capacity // FLAGS), _pack(below & (score >= 0.0)), mask=written)
