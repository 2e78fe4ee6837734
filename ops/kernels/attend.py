"""Attention of tiles: the dense span, the listed keys by index until they no longer matter, and block means."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .helpers import (
    KEY_BLOCK,
    LN_2,
    clip,
    dot_logits,
    finite_or_zero,
    float32,
    load_padding,
    load_rows,
    mask_terms,
    see,
    span,
)


@triton.jit
def _add(
    maximum,
    mass,
    total,
    rows,
    key,
    value,
    key_stride,
    value_stride,
    index,
    inside,
    seen,
    bias,
    scale,
    softcap,
    VARIES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the keys and values at `index` [N] that are `inside` to the online softmax of the rows that see them."""
    if VARIES:
        # What a key holds that no row sees does not matter.
        inside = inside & (tl.max(seen.to(tl.int32), 0) > 0)
    keys = load_rows(key, index, inside, key_stride, D, BLOCK_D)
    values = load_rows(value, index, inside, value_stride, DV, BLOCK_DV)
    logits = dot_logits(rows, tl.trans(keys), scale, softcap, SOFTCAP, PRECISION) + bias[None, :]
    logits = tl.where(seen, logits, float("-inf"))
    largest = tl.maximum(maximum, tl.max(logits, 1))
    origin = finite_or_zero(largest)
    decay = tl.exp2(maximum - origin)
    weights = tl.exp2(logits - origin[:, None])
    gained = tl.sum(weights, 1)
    total = total * decay[:, None]
    total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    return largest, mass * decay + gained, total


@triton.jit
def _round_up(count):
    return (count + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK


@triton.jit
def attend_kernel(
    query,
    key,
    value,
    padding,
    query_documents,
    key_documents,
    mask,
    index,
    count,
    skipped,
    importance,
    mean_key,
    mean_value,
    output,
    lse,
    visited,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    padding_stride_b,
    query_documents_stride_b,
    key_documents_stride_b,
    mask_stride_b,
    mask_stride_h,
    mask_stride_n,
    mask_stride_k,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    groups,
    queries,
    keys,
    first_segment,
    segments,
    ranked_segments,
    tiles,
    offset,
    window,
    near_keys,
    capacity,
    blocks,
    threshold,
    log2_threshold,
    scale,
    softcap,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_PADDING: tl.constexpr,
    WINDOW: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    SAMPLED: tl.constexpr,
    STOP_BY_GAIN: tl.constexpr,
    CHUNK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend one tile: TILE positions of HEADS heads that share a list.

    Lists as `select_kernel` and `importance_kernel` write them. Program (tile, latest first; part of the group's heads;
    batch entry and group).
    """
    scale, softcap = float32(scale), float32(softcap)
    threshold, log2_threshold = float32(threshold), float32(log2_threshold)
    tiles_per_segment: tl.constexpr = SEGMENT // TILE
    parts_per_list: tl.constexpr = (GROUP // LISTS + HEADS - 1) // HEADS
    tile = first_segment * tiles_per_segment + tl.num_programs(0) - 1 - tl.program_id(0)
    segment = tile // tiles_per_segment
    batch = (tl.program_id(2) // groups).to(tl.int64)
    group = (tl.program_id(2) % groups).to(tl.int64)
    which = tl.program_id(1) // parts_per_list
    place = (tl.program_id(2) * LISTS + which) * segments + segment - first_segment
    end_head = (which + 1) * (GROUP // LISTS)

    row = tl.arange(0, BLOCK_M)
    head = which * (GROUP // LISTS) + tl.program_id(1) % parts_per_list * HEADS + row // TILE
    position = tile * TILE + row % TILE
    real = (row < HEADS * TILE) & (head < end_head) & (position < queries)
    head = (group * GROUP + head).to(tl.int64)
    channels = tl.arange(0, BLOCK_D)
    pointers = query + batch * query_stride_b + head[:, None] * query_stride_h
    pointers += position.to(tl.int64)[:, None] * query_stride_n + channels[None, :]
    rows = tl.load(pointers, mask=real[:, None] & (channels < D)[None, :], other=0.0)
    key += batch * key_stride_b + group * key_stride_h
    value += batch * value_stride_b + group * value_stride_h
    padding += batch * padding_stride_b
    terms = mask_terms(
        batch, offset, window, query_documents, query_documents_stride_b, key_documents, key_documents_stride_b,
        mask, mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    )  # fmt: skip

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    no_bias = tl.zeros([BLOCK_N], tl.float32)
    varies: tl.constexpr = WINDOW or DOCUMENTS or MASK

    begin, low, high = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    end = high
    if CAUSAL:
        end = tl.maximum(low, clip(tl.minimum((tile + 1) * TILE, queries) + offset, keys))
    for start in range(low, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = load_padding(padding, column, column < end, HAS_PADDING)
        seen = see(terms, head, position, real, column, inside, CAUSAL, WINDOW, DOCUMENTS, MASK)
        maximum, mass, total = _add(
            maximum, mass, total, rows, key, value, key_stride_n, value_stride_n, column, inside, seen, no_bias,
            scale, softcap, varies, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    seen_keys = _round_up(end - low)

    listed = tl.load(count + place)
    index += place.to(tl.int64) * capacity
    importance += place.to(tl.int64) * capacity - begin
    if STOP_BY_GAIN:
        done = 0
        while done < listed:
            stop = tl.minimum(done + CHUNK, listed)
            maximum_before, mass_before = maximum, mass
            for start in range(done, stop, BLOCK_N):
                column = start + tl.arange(0, BLOCK_N)
                inside = column < stop
                chosen = tl.load(index + column, mask=inside, other=0)
                seen = see(terms, head, position, real, chosen, inside, False, WINDOW, DOCUMENTS, MASK)
                maximum, mass, total = _add(
                    maximum, mass, total, rows, key, value, key_stride_n, value_stride_n, chosen, inside, seen, no_bias,
                    scale, softcap, varies, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
                )  # fmt: skip
            seen_keys += _round_up(stop - done)
            before = mass_before * tl.exp2(maximum_before - finite_or_zero(maximum))
            small = (mass - before) < threshold * before
            goes_on = tl.sum((real & (small == 0)).to(tl.int32), 0) > 0
            done = tl.where(goes_on, stop, listed)
    else:
        for start in range(0, listed, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            inside = column < listed
            chosen = tl.load(index + column, mask=inside, other=0)
            seen = see(terms, head, position, real, chosen, inside, False, WINDOW, DOCUMENTS, MASK)
            bias = no_bias
            if SAMPLED:
                bias = tl.maximum(log2_threshold - tl.load(importance + chosen, mask=inside, other=0.0), 0.0)
            maximum, mass, total = _add(
                maximum, mass, total, rows, key, value, key_stride_n, value_stride_n, chosen, inside, seen, bias,
                scale, softcap, varies, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
        seen_keys += _round_up(listed)

    if HAS_MEANS:
        history_blocks = low // KEY_BLOCK
        end_block = history_blocks
        if not CAUSAL:
            history_blocks += (keys - high + KEY_BLOCK - 1) // KEY_BLOCK
            end_block = tl.where(history_blocks > 0, blocks, 0)
        skipped += place.to(tl.int64) * blocks
        mean_key += (batch * groups + group) * blocks * D
        mean_value += (batch * groups + group) * blocks * DV
        for start in range(0, end_block, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            left = tl.load(skipped + column, mask=column < end_block, other=0)
            inside = left > 0
            bias = tl.log2(tl.maximum(left, 1).to(tl.float32))
            maximum, mass, total = _add(
                maximum, mass, total, rows, mean_key, mean_value, D, DV, column, inside, inside[None, :], bias,
                scale, softcap, False, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
            )  # fmt: skip
        seen_keys += _round_up(history_blocks)

    total = total / tl.where(mass == 0, 1.0, mass)[:, None]
    wide = tl.arange(0, BLOCK_DV)
    pointers = output + batch * output_stride_b + head[:, None] * output_stride_h
    pointers += position.to(tl.int64)[:, None] * output_stride_n + wide[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=real[:, None] & (wide < DV)[None, :])
    head_place = batch * groups * GROUP + head
    tl.store(lse + head_place * queries + position, (maximum + tl.log2(mass)) * LN_2, mask=real)
    rows_in_tile = tl.minimum(queries - tile * TILE, TILE)
    pairs = (seen_keys * rows_in_tile).to(tl.int64)
    tl.store(
        visited + head_place * tiles + tile,
        pairs + tl.zeros([BLOCK_M], tl.int64),
        mask=real & (row % TILE == 0),
    )
