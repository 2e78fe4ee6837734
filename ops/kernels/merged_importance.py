"""The importance of keys, or whether it reaches the threshold, where guides are merged queries (`merge`)."""

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
    in_pairs,
    load_guides,
    load_rows,
    pack_halves,
    round_up,
    scale_and_add,
    span,
    unit_scale,
)
from .launch import launch
from .merge import MergedGuides, load_origins
from .products import LANES, by_segment, decided, larger, pack_flags, place_rows, raise_largest
from .quantise import Operands
from .scoring import Scoring
from .tiling import merged_importance_tiling
from .variants import kernel

NEGLECT_LIMIT = tl.constexpr(channels.NEGLECT_LIMIT)
LEAST_UNIT = tl.constexpr(1e-3)
"""Of products with digits, in bits: half precision then has room for log-sum-exps beside logits.

KV heads below it are scored in all channels, without digits.
"""


def score_merged(
    arguments: Arguments,
    scoring: Scoring,
    merged: MergedGuides,
    operands: Operands,
    segments: range,
    importance: torch.Tensor,
) -> None:
    """Write the importance of the keys of the KV heads that are scored by these operands."""
    config, guide_lse, distances, neglected = arguments.config, scoring.guide_lse, scoring.distances, scoring.neglected
    guides, key = operands.guides, operands.key
    capacity, most = arguments.capacity(segments[-1]), arguments.guides_of_segment
    half = quantise.sums_in_half(operands, False, arguments.device)
    registers = tilings.FOLDED_REGISTERS if operands.folded else tilings.SHARED_REGISTERS
    tiling = merged_importance_tiling(key.shape[-1], key.element_size(), half)
    together = tiling.segments(min(most, tilings.MERGED_ROWS))
    programs = -(-len(segments) // together) * -(-(capacity + config.ranking.segment * together) // tilings.CHUNK)
    launch(
        merged_importance_kernel, (programs, arguments.lists, arguments.batch_kv_heads),
        guides, operands.ranges, guide_lse, merged.reach, merged.counts, key,
        guide_lse if distances is None else distances, guide_lse if neglected is None else neglected,
        arguments.masks[0], importance,
        *guides.stride()[:4], *key.stride()[:3], arguments.mask_strides[0],
        first_segment=segments.start, segments=len(segments), all_segments=arguments.geometry.segments,
        capacity=capacity, chunk=tilings.CHUNK, threshold=config.threshold, **arguments.spans,
        kv_heads=arguments.kv_heads, scale=arguments.shared["scale"], softcap=arguments.shared["softcap"],
        SEGMENTS=together, PER_SEGMENT=most, HAS_PADDING=arguments.shared["HAS_PADDING"],
        SOFTCAP=arguments.shared["SOFTCAP"], HALF=half, FOLDED=operands.folded,
        FOLDS=scoring.subset is not None and scoring.subset.folded, MEASURES_OUTPUT=distances is not None,
        SAMPLED=config.has_samples, CHOICE_PER_KV_HEAD=neglected is not None, IS_SUBSET=operands is scoring.subset,
        PRECISION=arguments.shared["PRECISION"], MOST_PARTS=tilings.MOST_PARTS,
        HALVINGS=tilings.HALVINGS, AMONG=max(together, tilings.AMONG), **operands.arguments,
        **tiling.arguments, **({"maxnreg": registers} if half else {}),
    )  # fmt: skip


@triton.jit
def _fullest_first(count, first, end, place, SEGMENTS: tl.constexpr, AMONG: tl.constexpr):
    """The segments [SEGMENTS] at `place` of AMONG from `first` to `end`, those of the most guides first.

    Segments from `end` on come last.
    """
    other = tl.arange(0, AMONG)
    size = tl.load(count + first + other, mask=first + other < end, other=-1) * AMONG + other
    rank = tl.sum((size[None, :] > size[:, None]).to(tl.int32), 1)
    wanted = place * SEGMENTS + tl.arange(0, SEGMENTS)
    return first + tl.sum(tl.where(rank[None, :] == wanted[:, None], other[None, :], 0), 1)


@triton.jit
def _guides_of_rows(count, part, end, row, done, PER_SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr):
    """The guides at rows of a part of the segments `part` [SEGMENTS], `done` of each being before.

    The first of their segment, they themselves, and which exist.
    """
    number, slot = place_rows(row, SEGMENTS, LANES)
    is_same = number[:, None] == tl.arange(0, SEGMENTS)[None, :]
    segment = tl.sum(tl.where(is_same, part[None, :], 0), 1)
    real = done + slot < tl.load(count + segment, mask=segment < end, other=0)
    return segment * PER_SEGMENT, segment * PER_SEGMENT + done + slot, real


@triton.jit
def _origins(
    lse, reach, count, part, end, row, correction, done, PER_SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """What is added to the logits of the guides at rows of a part, -inf where there is no guide."""
    _, guide, real = _guides_of_rows(count, part, end, row, done, PER_SEGMENT, SEGMENTS)
    return load_origins(lse, reach, guide, real, correction)


@triton.jit
def _load_part(
    guides, lse, reach, count, part, end, correction, done, stride_n, PER_SEGMENT: tl.constexpr, ROWS: tl.constexpr,
    SEGMENTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr, FOLDED: tl.constexpr,
):  # fmt: skip
    """ROWS guides of the segments `part` in all, `done` of each being those before: channels, and `_origins`.

    Segments from `end` on have none. With HALF origins are in pairs as `scale_and_add` takes them. With FOLDED they are
    part of the channels, and the first guide of a segment stands in for those that it lacks.
    """
    row = tl.arange(0, ROWS)
    first, guide, real = _guides_of_rows(count, part, end, row, done, PER_SEGMENT, SEGMENTS)
    if FOLDED:
        guide, real = tl.where(real, guide, first), first < end * PER_SEGMENT
    rows = load_guides(guides, guide * 0, guide, real, 0, stride_n, D, BLOCK_D)
    if FOLDED:
        origin = row  # Nobody reads it.
    elif HALF:
        origin = pack_halves(
            _origins(lse, reach, count, part, end, row & -2, correction, done, PER_SEGMENT, SEGMENTS),
            _origins(lse, reach, count, part, end, row | 1, correction, done, PER_SEGMENT, SEGMENTS),
        )
    else:
        origin = _origins(lse, reach, count, part, end, row, correction, done, PER_SEGMENT, SEGMENTS)
    return rows, origin


@triton.jit
def _score_chunk(
    parts, key, distances, padding, importance, spans, start_of_chunk, end_of_chunk, keys, key_stride_n, scale, softcap,
    step, done,
    PARTS: tl.constexpr, SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr,
    SOFTCAP: tl.constexpr, HALF: tl.constexpr, FOLDED: tl.constexpr, MEASURES_OUTPUT: tl.constexpr,
    SAMPLED: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the importance of a chunk of keys by PARTS of the guides, or raise it, where some were `done` before."""
    low, high, end = spans
    for start in range(start_of_chunk, end_of_chunk, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        block = load_rows(key, column, column < keys, key_stride_n, D, BLOCK_D)
        largest = tl.full([BLOCK_N, SEGMENTS], float("-inf"), tl.float16 if HALF else tl.float32)
        for part in tl.static_range(PARTS):
            rows, origin = parts[part]
            if FOLDED:
                logits = in_pairs(tl.dot(block, tl.trans(rows), out_dtype=tl.float16))
            elif HALF:
                logits = scale_and_add(tl.dot(block, tl.trans(rows), out_dtype=tl.float16), scale, origin)
            else:
                logits = dot_logits(block, tl.trans(rows), scale, softcap, SOFTCAP, PRECISION) + origin[None, :]
            largest = raise_largest(largest, by_segment(logits, SEGMENTS, LANES), origin, SEGMENTS, LANES, HALF)
        score = largest.to(tl.float32)
        if FOLDED:
            score *= scale
        score = tl.exp2(score) * step
        score = decided(
            score, column, keys, low, high, distances, padding, MEASURES_OUTPUT, HAS_PADDING, CAUSAL
        )  # fmt: skip
        if SAMPLED:
            pointers = importance[None, :] + column[:, None]
            written = column[:, None] < end[None, :]
            if done > 0:
                score = larger(score, tl.load(pointers, mask=written, other=0.0).to(tl.float32))
            tl.store(pointers, score, mask=written)
        else:
            first_of_word = start + tl.arange(0, BLOCK_N // FLAGS_PER_WORD) * FLAGS_PER_WORD
            pointers = importance[None, :] + (first_of_word // FLAGS_PER_WORD)[:, None]
            written = first_of_word[:, None] < end[None, :]
            if not CAUSAL:
                score = tl.where((column < keys)[:, None], score, -1.0)
            # Not above or equal: a NaN is sure to be visited.
            flags = pack_flags((score < 1.0) == 0)
            if done > 0:
                flags |= tl.load(pointers, mask=written, other=0)
            tl.store(pointers, flags, mask=written)


@triton.jit
def _score_parts(
    guides, lse, reach, count, part, end, correction, key, distances, padding, importance, spans, start_of_chunk,
    end_of_chunk, keys, guides_stride_n, key_stride_n, scale, softcap, step, done,
    PARTS: tl.constexpr, LAST: tl.constexpr, PER_SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr, SOFTCAP: tl.constexpr, HALF: tl.constexpr, FOLDED: tl.constexpr,
    MEASURES_OUTPUT: tl.constexpr, SAMPLED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_score_chunk` by the next guides: PARTS of up to 3 parts of BLOCK_M, the last one of LAST."""
    of_part: tl.constexpr = BLOCK_M // SEGMENTS
    last = _load_part(
        guides, lse, reach, count, part, end, correction, done + (PARTS - 1) * of_part, guides_stride_n, PER_SEGMENT,
        LAST, SEGMENTS, D, BLOCK_D, HALF, FOLDED,
    )  # fmt: skip
    one, two = last, last
    if PARTS > 1:
        one = _load_part(
            guides, lse, reach, count, part, end, correction, done, guides_stride_n, PER_SEGMENT, BLOCK_M, SEGMENTS, D,
            BLOCK_D, HALF, FOLDED,
        )  # fmt: skip
    if PARTS > 2:
        two = _load_part(
            guides, lse, reach, count, part, end, correction, done + of_part, guides_stride_n, PER_SEGMENT, BLOCK_M,
            SEGMENTS, D, BLOCK_D, HALF, FOLDED,
        )  # fmt: skip
    parts = (last, last, last) if PARTS == 1 else (one, last, last) if PARTS == 2 else (one, two, last)
    _score_chunk(
        parts, key, distances, padding, importance, spans, start_of_chunk, end_of_chunk, keys, key_stride_n, scale,
        softcap, step, done, PARTS, SEGMENTS, CAUSAL, HAS_PADDING, SOFTCAP, HALF, FOLDED, MEASURES_OUTPUT, SAMPLED, D,
        BLOCK_N, BLOCK_D, PRECISION,
    )  # fmt: skip


@kernel
def merged_importance_kernel(
    guides, ranges, lse, reach, count, key, distances, neglected, padding, importance,
    guides_stride_b, guides_stride_kv, guides_stride_h, guides_stride_n, key_stride_b, key_stride_h, key_stride_n,
    padding_stride_b,
    kv_heads, queries, keys, first_segment, segments, all_segments, ranked_segments, offset, window, near_keys,
    capacity, chunk, threshold, scale, softcap,
    SEGMENT: tl.constexpr, PER_SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, HAS_PADDING: tl.constexpr, SOFTCAP: tl.constexpr, QUANTISED: tl.constexpr,
    HALF: tl.constexpr, FOLDED: tl.constexpr, FOLDS: tl.constexpr, MEASURES_OUTPUT: tl.constexpr,
    SAMPLED: tl.constexpr, CHOICE_PER_KV_HEAD: tl.constexpr, IS_SUBSET: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MOST_PARTS: tl.constexpr,
    HALVINGS: tl.constexpr, AMONG: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write importance as `importance_kernel` does, by as many guides as each of SEGMENTS segments has.

    These are multiplied in parts of BLOCK_M, of all segments, MOST_PARTS for each time that the keys of the program are
    loaded, the last one halved up to HALVINGS times if no more is left; the largest score so far is then in memory.

    With FOLDS the picked channels hold digits (`fold`), which a launch with FOLDED scores by; another one scores the KV
    heads that these are not for.

    Program (`chunk` keys for SEGMENTS of AMONG consecutive segments, the last of these first, and among them those of
    the fewest guides; list of the KV head; batch entry and KV head).
    """
    correction = 0.0
    scale = unit_scale(scale, ranges, tl.program_id(2), tl.num_programs(2), QUANTISED)
    if CHOICE_PER_KV_HEAD:
        variance = tl.load(neglected + tl.program_id(2))
        is_above = (variance > NEGLECT_LIMIT).to(tl.int32)
        if FOLDS:
            is_above |= 1 - (scale >= LEAST_UNIT).to(tl.int32)
        if is_above == (1 if IS_SUBSET else 0):
            return
        if IS_SUBSET:
            correction = variance * LOG2_E
    softcap = float32(softcap)
    step = 1 / float32(threshold)
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    lists = tl.num_programs(1)
    of_part: tl.constexpr = BLOCK_M // SEGMENTS
    key += batch * key_stride_b + kv_head * key_stride_h
    distances += tl.program_id(2).to(tl.int64) * keys
    padding += batch * padding_stride_b

    of_list = tl.program_id(2) * lists + tl.program_id(1)
    first_list = of_list.to(tl.int64) * all_segments
    count += first_list
    lse += first_list * PER_SEGMENT
    reach += first_list * PER_SEGMENT
    groups = (segments + SEGMENTS - 1) // SEGMENTS
    group = groups - 1 - tl.program_id(0) % groups
    of_among: tl.constexpr = AMONG // SEGMENTS
    last = tl.minimum(ranked_segments, first_segment + segments)
    first = first_segment + group // of_among * AMONG
    part = _fullest_first(count, first, last, group % of_among, SEGMENTS, AMONG)
    is_ranked = part < last
    begin, low, high = span(part, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    # Whole blocks, which lists have room for, so that importance is stored in vectors.
    end = tl.where(is_ranked, low if CAUSAL else round_up(keys, KEY_BLOCK), begin)
    importance += ((of_list * segments + part - first_segment).to(tl.int64) * capacity) // (
        1 if SAMPLED else FLAGS_PER_WORD
    )
    start_of_chunk = tl.program_id(0) // groups * chunk
    end_of_chunk = tl.minimum(start_of_chunk + chunk, tl.max(end, 0))
    if start_of_chunk >= end_of_chunk:
        return
    guides += batch * guides_stride_b + kv_head * guides_stride_kv + tl.program_id(1).to(tl.int64) * guides_stride_h
    most = tl.max(tl.load(count + part, mask=is_ranked, other=0), 0)
    if HALF and not FOLDED:
        scale = pack_halves(scale, scale)
    spans = (low, high, end)
    for done in range(0, most, MOST_PARTS * of_part):
        rest = most - done
        for parts in tl.static_range(1, MOST_PARTS + 1):
            before = (parts - 1) * of_part
            for halved in tl.static_range(HALVINGS + 1):
                at_least = before if halved == HALVINGS else before + (of_part >> (halved + 1))
                fits = (rest <= before + (of_part >> halved)) | (parts == MOST_PARTS and halved == 0)
                if (rest > at_least) & fits:
                    _score_parts(
                        guides, lse, reach, count, part, last, correction, key, distances, padding, importance, spans,
                        start_of_chunk, end_of_chunk, keys, guides_stride_n, key_stride_n, scale, softcap, step, done,
                        parts, BLOCK_M >> halved, PER_SEGMENT, SEGMENTS, CAUSAL, HAS_PADDING, SOFTCAP, HALF, FOLDED,
                        MEASURES_OUTPUT, SAMPLED, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION,
                    )  # fmt: skip
