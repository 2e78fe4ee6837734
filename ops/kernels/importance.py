"""The importance of each key of a history, or whether it reaches the threshold, for each list of keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rule import channels
from . import quantise
from . import tiling as tilings
from .arguments import Arguments
from .helpers import (
    FLAGS_PER_WORD,
    KEY_BLOCK,
    LOG2_E,
    dot_logits,
    float32,
    load_guides,
    load_rows,
    mask_terms,
    pack_halves,
    place_guides,
    round_up,
    scale_and_add,
    see,
    span,
    unit_scale,
)
from .launch import launch
from .lists import empty_importance
from .merged_importance import score_merged
from .products import LANES, by_segment, decided, pack_flags, place_rows, raise_largest
from .quantise import Operands
from .scoring import Scoring
from .tiling import importance_tiling
from .variants import kernel

NEGLECT_LIMIT = tl.constexpr(channels.NEGLECT_LIMIT)


def score(arguments: Arguments, scoring: Scoring, segments: range) -> torch.Tensor:
    """The importance of the keys of each list's history, or flags where the tail is not sampled (`lists`)."""
    importance = empty_importance(arguments, segments)
    for operands in (scoring.subset, scoring.all_channels):
        if operands is not None and scoring.merged is None:
            _score(arguments, scoring, operands, segments, importance)
        elif operands is not None and scoring.merged is not None:
            score_merged(arguments, scoring, scoring.merged, operands, segments, importance)
    return importance


def _score(
    arguments: Arguments, scoring: Scoring, operands: Operands, segments: range, importance: torch.Tensor
) -> None:
    """Write the importance of the keys of the KV heads that are scored by these operands."""
    config, guide_lse, distances, neglected = arguments.config, scoring.guide_lse, scoring.distances, scoring.neglected
    guides, key = operands.guides, operands.key
    capacity = arguments.capacity(segments[-1])
    total = guides.shape[2] // arguments.lists * arguments.guides_of_segment
    half = quantise.sums_in_half(operands, arguments.takes_mean, arguments.device)
    tiling = importance_tiling(key.shape[-1], key.element_size(), total, half)
    together = tiling.guides.segments(total)
    programs = -(-len(segments) // together) * -(-(capacity + config.ranking.segment * together) // tilings.CHUNK)
    launch(
        importance_kernel, (programs, arguments.lists, arguments.batch_kv_heads),
        guides, operands.ranges, guide_lse, key, guide_lse if distances is None else distances,
        guide_lse if neglected is None else neglected, *arguments.masks, importance,
        *guides.stride()[:4], *key.stride()[:3], *arguments.mask_strides,
        first_segment=segments.start, segments=len(segments), capacity=capacity, chunk=tilings.CHUNK,
        threshold=config.threshold, LISTS_PER_KV_HEAD=arguments.lists, SEGMENTS=together,
        HALF=half, TAKES_MEAN=arguments.takes_mean, SAMPLED=config.has_samples, MEASURES_OUTPUT=distances is not None,
        CHOICE_PER_KV_HEAD=neglected is not None, IS_SUBSET=operands is scoring.subset,
        **arguments.shared, **operands.arguments, **tiling.arguments,
    )  # fmt: skip


@triton.jit
def _load_part(
    guides, lse, correction, first, done, guides_per_head, stride_h, stride_n, HEADS: tl.constexpr,
    PER_SEGMENT: tl.constexpr, ROWS: tl.constexpr, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """ROWS guides of each of SEGMENTS segments, `done` being those before: their channels, and their log-sum-exps.

    The latter negated and plus `correction`, with HALF in pairs as `scale_and_add` takes them.
    """
    row = tl.arange(0, ROWS * SEGMENTS)
    segment, slot = place_rows(row, SEGMENTS, BESIDE)
    head, guide, real = place_guides(first + segment, done + slot, guides_per_head, HEADS, PER_SEGMENT)
    rows = load_guides(guides, head, guide, real, stride_h, stride_n, D, BLOCK_D)
    if HALF:
        origin = pack_halves(
            correction + _origins(lse, row & -2, first, done, guides_per_head, HEADS, PER_SEGMENT, SEGMENTS, BESIDE),
            correction + _origins(lse, row | 1, first, done, guides_per_head, HEADS, PER_SEGMENT, SEGMENTS, BESIDE),
        )
    else:
        origin = correction + _origins(lse, row, first, done, guides_per_head, HEADS, PER_SEGMENT, SEGMENTS, BESIDE)
    return rows, origin


@triton.jit
def _origins(
    lse, row, first, done, guides_per_head, HEADS: tl.constexpr, PER_SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    BESIDE: tl.constexpr,
):  # fmt: skip
    """The negated log-sum-exps at rows of a part, -inf where there is no guide."""
    segment, slot = place_rows(row, SEGMENTS, BESIDE)
    head, guide, real = place_guides(first + segment, done + slot, guides_per_head, HEADS, PER_SEGMENT)
    return -tl.load(lse + head.to(tl.int64) * guides_per_head + guide, mask=real, other=float("inf"))


@kernel
def importance_kernel(
    guides, ranges, lse, key, distances, neglected, padding, query_documents, key_documents, mask, importance,
    guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n, key_stride_b, key_stride_h, key_stride_n,
    padding_stride_b, query_documents_stride_b, key_documents_stride_b,
    mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    kv_heads, queries, keys, guides_per_head, first_segment, segments, ranked_segments, offset, window, near_keys,
    capacity, chunk, threshold, scale, softcap,
    SEGMENT: tl.constexpr, POOL: tl.constexpr, SEGMENTS: tl.constexpr,
    GUIDE_HEADS: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, QUANTISED: tl.constexpr, HALF: tl.constexpr, TAKES_MEAN: tl.constexpr,
    MEASURES_OUTPUT: tl.constexpr, SAMPLED: tl.constexpr, CHOICE_PER_KV_HEAD: tl.constexpr, IS_SUBSET: tl.constexpr,
    GUIDES_RESIDENT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write importance, or without SAMPLED the flags of keys that reach the `threshold`; `lists` has their layout.

    Importance is the largest of the guides' shares of mass, or with TAKES_MEAN their mean; with MEASURES_OUTPUT it is
    multiplied by `distances` [B, Hkv, Lk]. CHOICE_PER_KV_HEAD: a launch for operands of a channel subset (IS_SUBSET)
    handles only the KV heads whose variance of the residual, `neglected` [B, Hkv], is below the limit, and corrects
    for it (`Projected.neglected`); a launch for all channels handles the others.

    The guides of a list are multiplied in parts, of BLOCK_M and a last one of BLOCK_REST where they are more than that,
    and loaded once if GUIDES_RESIDENT, else for each block of keys. HALF sums products in half precision. Keys are
    the rows of the product, so that the maximum over guides stays within a warp.

    Program (`chunk` keys for SEGMENTS consecutive segments, last first; list of the KV head; batch entry and KV head).
    """
    correction = 0.0
    if CHOICE_PER_KV_HEAD:
        variance = tl.load(neglected + tl.program_id(2))
        is_above = (variance > NEGLECT_LIMIT).to(tl.int32)
        if is_above == (1 if IS_SUBSET else 0):
            return
        if IS_SUBSET:
            correction = variance * LOG2_E
    softcap = float32(softcap)
    scale = unit_scale(scale, ranges, tl.program_id(2), tl.num_programs(2), QUANTISED)
    step = 1 / float32(threshold)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    per_segment: tl.constexpr = SEGMENT // POOL
    heads: tl.constexpr = GUIDE_HEADS // LISTS_PER_KV_HEAD
    total: tl.constexpr = heads * per_segment
    of_part: tl.constexpr = BLOCK_M // SEGMENTS
    # With a mask, products are laid out as the mask is loaded, and reduced across warps. Triton's reduction is wrong
    # there if the lanes of its axis stand between those of another.
    beside: tl.constexpr = 1 if MASK else LANES
    first_head = tl.program_id(1) * heads
    guides += batch * guides_stride_b + kv_head * guides_stride_kv + first_head.to(tl.int64) * guides_stride_h
    first_guide = ((batch * kv_heads + kv_head) * GUIDE_HEADS + first_head) * guides_per_head
    lse += first_guide
    key += batch * key_stride_b + kv_head * key_stride_h
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
    # Whole blocks, which lists have room for, so that importance is stored in vectors.
    end = tl.where(is_ranked, low if CAUSAL else round_up(keys, KEY_BLOCK), begin)
    present = tl.minimum(guides_per_head - part * per_segment, per_segment)
    place = (tl.program_id(2) * LISTS_PER_KV_HEAD + tl.program_id(1)) * segments + part - first_segment
    importance += (place.to(tl.int64) * capacity - begin) // (1 if SAMPLED else FLAGS_PER_WORD)

    resident = ()
    if GUIDES_RESIDENT:
        for done in tl.static_range(0, total, of_part):
            resident += (_load_part(  # type: ignore[assignment]
                guides, lse, correction, first, done, guides_per_head, guides_stride_h, guides_stride_n, heads,
                per_segment, of_part if done + of_part <= total or BLOCK_REST == 0 else BLOCK_REST, SEGMENTS,
                beside, D, BLOCK_D, HALF,
            ),)  # fmt: skip
    if HALF:
        scale = pack_halves(scale, scale)
    rows_differ: tl.constexpr = WINDOW or DOCUMENTS or MASK
    # A reduction hides the alignment, without which keys are stored one by one.
    start_of_chunk = tl.min(begin // KEY_BLOCK, 0) * KEY_BLOCK + tl.program_id(0) // parts * chunk
    for start in range(start_of_chunk, tl.minimum(start_of_chunk + chunk, tl.max(end, 0)), BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        block = load_rows(key, column, column < keys, key_stride_n, D, BLOCK_D)
        largest = tl.full([BLOCK_N, SEGMENTS], float("-inf"), tl.float16 if HALF else tl.float32)
        mean = tl.zeros([BLOCK_N, SEGMENTS], tl.float32)
        visible = tl.zeros([BLOCK_N, SEGMENTS], tl.int32)
        for done in tl.static_range(0, total, of_part):
            if GUIDES_RESIDENT:
                rows, origin = resident[done // of_part]  # type: ignore[var-annotated]
            else:
                rows, origin = _load_part(
                    guides, lse, correction, first, done, guides_per_head, guides_stride_h, guides_stride_n, heads,
                    per_segment, of_part if done + of_part <= total or BLOCK_REST == 0 else BLOCK_REST, SEGMENTS,
                    beside, D, BLOCK_D, HALF,
                )  # fmt: skip
            if HALF:
                logits = scale_and_add(tl.dot(block, tl.trans(rows), out_dtype=tl.float16), scale, origin)
            else:
                logits = dot_logits(block, tl.trans(rows), scale, softcap, SOFTCAP, PRECISION) + origin[None, :]
            if rows_differ:
                segment, slot = place_rows(tl.arange(0, rows.shape[0]), SEGMENTS, beside)
                head, guide, real = place_guides(first + segment, done + slot, guides_per_head, heads, per_segment)
                query_head, position = kv_head * GUIDE_HEADS + first_head + head, guide * POOL
                seen = see(terms, query_head, position, real, column, column < keys, False, WINDOW, DOCUMENTS, MASK)
                seen = tl.trans(seen & real[:, None])
                logits = tl.where(seen, logits, float("-inf"))
                visible = tl.maximum(visible, tl.max(by_segment(seen.to(tl.int32), SEGMENTS, beside), 2))
            of_segments = by_segment(logits, SEGMENTS, beside)
            if TAKES_MEAN:
                mean += tl.sum(tl.exp2(of_segments), 2)
            else:
                largest = raise_largest(largest, of_segments, origin, SEGMENTS, beside, HALF)
        score = mean * (step / (heads * present))[None, :] if TAKES_MEAN else tl.exp2(largest.to(tl.float32)) * step
        score = decided(
            score, column, keys, low, high, distances, padding, MEASURES_OUTPUT, HAS_PADDING, CAUSAL
        )  # fmt: skip
        if rows_differ:
            score = tl.where(visible > 0, score, -1.0)
        if SAMPLED:
            written = column[:, None] < end[None, :]
            if WINDOW:
                written = written & (column[:, None] >= begin[None, :])
            tl.store(importance[None, :] + column[:, None], score, mask=written)
        else:
            first_of_word = start + tl.arange(0, BLOCK_N // FLAGS_PER_WORD) * FLAGS_PER_WORD
            words = importance[None, :] + (first_of_word // FLAGS_PER_WORD)[:, None]
            written = first_of_word[:, None] < end[None, :]
            if WINDOW:
                written = written & (first_of_word[:, None] >= begin[None, :])
            if not CAUSAL:
                score = tl.where((column < keys)[:, None], score, -1.0)
            # Not above or equal: a NaN is sure to be visited.
            tl.store(words, pack_flags((score < 1.0) == 0), mask=written)
