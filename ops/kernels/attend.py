"""Attention of tiles: the dense span, and the listed keys by index."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from ..result import AttentionResult
from ..rule.sampling import MAX_WEIGHT_FACTOR
from .arguments import Arguments, padded
from .helpers import (
    KEY_BLOCK,
    LN_2,
    cap,
    clip,
    finite_or_zero,
    float32,
    load_padding,
    load_rows,
    mask_terms,
    round_up,
    see,
    span,
)
from .launch import launch
from .lists import Lists
from .tiling import MAX_ROWS, attend_tiling, shared_memory
from .variants import kernel

MAX_MASS = tl.constexpr(2.0**64)
"""Sums of weights up to which values of 2**63 leave room in float32."""
MAX_MASS_FLOAT16 = tl.constexpr(2.0**15)
"""Sums of weights each of which float16 has room for."""
FLOAT16_HEADROOM = tl.constexpr(5)
"""How much larger a fixed maximum is taken in float16, in units of log 2: weights up to 2**15 fit."""


def attend(arguments: Arguments, lists: Lists, segments: range, result: AttentionResult) -> None:
    """Attend the tiles of a run of segments, and write their part of the result.

    The rows of as many heads as fit make a block; those of the last heads, if they are few, a smaller one.
    """
    heads_of_list = arguments.group_size // arguments.lists
    most = max(1, min(heads_of_list, MAX_ROWS // arguments.config.ranking.tile))
    parts, rest = divmod(heads_of_list, most)
    if 2 * rest > most:
        parts, rest = parts + 1, 0
    _attend(arguments, lists, segments, result, most, parts, 0)
    if rest:
        _attend(arguments, lists, segments, result, rest, 1, parts * most)


def _attend(
    arguments: Arguments,
    lists: Lists,
    segments: range,
    result: AttentionResult,
    heads: int,
    parts: int,
    first_of_list: int,
) -> None:
    """Attend `parts` times so many `heads` of each list, from one on."""
    query, key, value, config, geometry = (
        arguments.query, arguments.key, arguments.value, arguments.config, arguments.geometry
    )  # fmt: skip
    # Every row has a maximum after the keys that need a mask.
    is_fixed = not arguments.visibility.rows_differ
    widest, shared, tile = max(key.shape[-1], value.shape[-1]), shared_memory(arguments.device), config.ranking.tile
    tiling = attend_tiling(widest, key.element_size(), heads * tile, is_fixed, shared)
    per_segment = config.ranking.segment // tile
    tiles = min(segments.stop * per_segment, geometry.tiles) - segments.start * per_segment
    launch(
        attend_kernel, (tiles, arguments.lists * parts, arguments.batch_kv_heads),
        query, key, value, *arguments.masks,
        arguments.rows, lists.index, lists.count, lists.log_weights, lists.guide_lse, lists.owner, *result,
        *query.stride()[:3], *key.stride()[:2], *value.stride()[:2], *arguments.mask_strides,
        *result.output.stride()[:3],
        **arguments.shared,
        KEY_STRIDE=key.stride(2), VALUE_STRIDE=value.stride(2),
        D=key.shape[-1], BLOCK_D=padded(key.shape[-1]), DV=value.shape[-1], BLOCK_DV=padded(value.shape[-1]),
        first_segment=segments.start, segments=len(segments), tiles=geometry.tiles, capacity=lists.capacity,
        first_of_list=first_of_list,
        log2_max_weight=math.log2(MAX_WEIGHT_FACTOR * max(config.threshold, 1e-30)),
        FIXED=is_fixed, BOUNDED=config.bounds_weights(key.shape[-1]), SAMPLED=config.has_samples,
        MOST_GUIDES=arguments.guides_of_segment if config.ranking.merges else 0,
        TILE=tile, GROUP_SIZE=arguments.group_size, LISTS_PER_KV_HEAD=arguments.lists, HEADS=heads, PARTS=parts,
        **tiling.arguments,
    )  # fmt: skip


@triton.jit
def add_keys(
    maximum, mass, total, rows, key, value, index, inside, seen, bias, limit, unit, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, FIXED: tl.constexpr, ROWS_DIFFER: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys and values at `index` [N] that are `inside` to the online softmax of the rows that see them.

    `inside` and `seen` are None where every row sees every key, `bias` [N] where there is none, `limit` [M] where it
    may raise logits without a bound. All of them are in steps of `unit`, a step of log 2, which saves a multiplication.
    With FIXED the maximum stays what it is: weights may exceed 1, and nothing is rescaled.
    """
    if ROWS_DIFFER:
        # What a key holds that no row sees does not matter.
        inside = tl.max(seen.to(tl.int32), 0) > 0
    keys = load_rows(key, index, inside, KEY_STRIDE, D, BLOCK_D)
    values = load_rows(value, index, inside, VALUE_STRIDE, DV, BLOCK_DV)
    return add_loaded(
        maximum, mass, total, rows, keys, values, seen, bias, limit, unit, softcap, FIXED, SOFTCAP, PRECISION
    )


@triton.jit
def add_loaded(
    maximum, mass, total, rows, keys, values, seen, bias, limit, unit, softcap,
    FIXED: tl.constexpr, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`add_keys` of keys [N, BLOCK_D] and values [N, BLOCK_DV] that are loaded."""
    logits = tl.dot(rows, tl.trans(keys), input_precision=PRECISION)
    if SOFTCAP:
        logits = cap(logits, softcap)
    if bias is not None and limit is not None:
        highest = tl.maximum(logits, limit[:, None], propagate_nan=tl.PropagateNan.ALL)
        logits = tl.minimum(logits + bias[None, :], highest, propagate_nan=tl.PropagateNan.ALL)
    elif bias is not None:
        logits += bias[None, :]
    if seen is not None:
        logits = tl.where(seen, logits, float("-inf"))
    if not FIXED:
        before, maximum = maximum, tl.maximum(maximum, tl.max(logits, 1))
        # Exactly 1 where the maximum stays: a rounding of the product would grow with each block.
        decay = tl.exp2((before - finite_or_zero(maximum)) * unit)
        mass *= decay
        total *= decay[:, None]
    weights = tl.exp2(logits * unit - (finite_or_zero(maximum) * unit)[:, None])
    mass += tl.sum(weights, 1)
    total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    return maximum, mass, total


@triton.jit
def lower_weights(maximum, mass, total, unit, dtype: tl.constexpr):
    """The online softmax with room for weights above 1 in float16, from here on under a fixed maximum."""
    if dtype == tl.float16:
        maximum += FLOAT16_HEADROOM / unit
        mass *= 0.5**FLOAT16_HEADROOM
        total *= 0.5**FLOAT16_HEADROOM
    return maximum, mass, total


@triton.jit
def _masked_prologue(
    rows, places, tensors, lists, terms, limit, low, end, first, listed, unit, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr, SAMPLED: tl.constexpr, SOFTCAP: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax of what needs a mask: of the keys from `low` to `end`, and of the list from `first` on."""
    head, position, real = places
    key, value, padding = tensors
    rows_of_keys, index, log_weights = lists
    rows_differ: tl.constexpr = WINDOW or DOCUMENTS or MASK
    lane = tl.arange(0, BLOCK_N)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    dense_blocks = (end - low + BLOCK_N - 1) // BLOCK_N
    for block in range(dense_blocks + (listed - first + BLOCK_N - 1) // BLOCK_N):
        is_dense = block < dense_blocks
        column = tl.where(is_dense, low + block * BLOCK_N, first + (block - dense_blocks) * BLOCK_N) + lane
        inside = column < tl.where(is_dense, end, listed)
        of_list = column < tl.where(is_dense, 0, listed)
        chosen = tl.load(tl.where(is_dense, rows_of_keys, index) + column, mask=inside, other=0)
        # Where rows do not differ, all see what is listed, and only the positions of other keys are known.
        seen_as = chosen if rows_differ else tl.where(is_dense, column, 0)
        bias = None
        if SAMPLED:
            bias = tl.load(log_weights + column, mask=of_list, other=0.0).to(tl.float32) / unit
        inside = load_padding(padding, chosen, inside, HAS_PADDING)
        seen = see(terms, head, position, real, seen_as, inside, CAUSAL, WINDOW, DOCUMENTS, MASK)
        maximum, mass, total = add_keys(
            maximum, mass, total, rows, key, value, chosen, inside, seen, bias, limit,
            unit, softcap, KEY_STRIDE, VALUE_STRIDE, False, rows_differ, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    return maximum, mass, total


@triton.jit
def _places(
    tile, first_head, end_head, first_head_of_kv_head, queries, HEADS: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The heads and positions of the rows of a tile [BLOCK_M], and which of them are real."""
    row = tl.arange(0, BLOCK_M)
    head, position = first_head + row // TILE, tile * TILE + row % TILE
    real = (row < HEADS * TILE) & (head < end_head) & (position < queries)
    return (first_head_of_kv_head + head).to(tl.int64), position, real


@triton.jit
def _load_queries(query, places, stride_h, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The queries at some places [M, BLOCK_D]."""
    head, position, real = places
    channels = tl.arange(0, BLOCK_D)
    pointers = query + head[:, None] * stride_h + position.to(tl.int64)[:, None] * stride_n + channels[None, :]
    return tl.load(pointers, mask=real[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def _limits(
    guide_lse, owner, places, of_list, segment, first_head, queries, guides_per_head, log2_max_weight, unit,
    POOL: tl.constexpr, GUIDE_HEADS: tl.constexpr, MOST_GUIDES: tl.constexpr,
):  # fmt: skip
    """What a weight may raise the logits of rows to [M], in steps of `unit`.

    `guide_lse` and `owner` are those of a KV head, whose first head is `first_head`; `of_list` is its list.
    """
    head, position, real = places
    member = head - first_head
    if MOST_GUIDES > 0:
        slot = tl.load(owner + member * queries + position, mask=real, other=0)
        guide = of_list * guides_per_head + segment * MOST_GUIDES + slot
    else:
        guide = (member if GUIDE_HEADS > 1 else member * 0) * guides_per_head + position // POOL
    limit = tl.load(guide_lse + guide, mask=real, other=0.0) + log2_max_weight
    return tl.where(limit == limit, limit / unit, float("inf"))


@triton.jit
def _load_log_weights(log_weights, column, end, SAMPLED: tl.constexpr):
    """The log-weights at places of a list before `end`, 0 at those below 0; with SAMPLED, else some number."""
    return tl.load(log_weights + column, mask=(column >= 0) & (column < end), other=0.0) if SAMPLED else 0.0


@triton.jit
def _write(
    output, lse, visited, places, maximum, mass, total, seen_keys, tile, tiles, queries, unit,
    stride_h, stride_n, TILE: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """Write output, log-sum-exp and visited pairs of the rows of a tile; `lse` and `visited` of the batch entry."""
    head, position, real = places
    total = total / tl.where(mass == 0, 1.0, mass)[:, None]
    wide = tl.arange(0, total.shape[1])
    pointers = output + head[:, None] * stride_h + position.to(tl.int64)[:, None] * stride_n + wide[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=real[:, None] & (wide < DV)[None, :])
    tl.store(lse + head * queries + position, (maximum * unit + tl.log2(mass)) * LN_2, mask=real)
    pairs = (seen_keys * tl.minimum(queries - tile * TILE, TILE)).to(tl.int64)
    pairs += tl.zeros([total.shape[0]], tl.int64)
    tl.store(visited + head * tiles + tile, pairs, mask=real & (position % TILE == 0))


@triton.jit
def _outgrew(maximum, mass, dtype: tl.constexpr):
    """Whether the weights of a row are more than a fixed maximum leaves room for."""
    max_mass: tl.constexpr = MAX_MASS_FLOAT16 if dtype == tl.float16 else MAX_MASS
    lost = (mass > max_mass) | ((maximum == float("-inf")) & (mass > 0))
    return tl.max(lost.to(tl.int32), 0) > 0


@kernel
def attend_kernel(
    query, key, value, padding, query_documents, key_documents, mask,
    rows_of_keys, index, count, log_weights, guide_lse, owner,
    output, lse, visited,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, value_stride_b, value_stride_h,
    padding_stride_b, query_documents_stride_b, key_documents_stride_b,
    mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    output_stride_b, output_stride_h, output_stride_n,
    kv_heads, queries, keys, first_segment, segments, ranked_segments, tiles, offset, window, near_keys,
    capacity, first_of_list, log2_max_weight, guides_per_head, scale, softcap,
    SEGMENT: tl.constexpr, TILE: tl.constexpr,
    GROUP_SIZE: tl.constexpr, LISTS_PER_KV_HEAD: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, SAMPLED: tl.constexpr, BOUNDED: tl.constexpr, FIXED: tl.constexpr,
    POOL: tl.constexpr, GUIDE_HEADS: tl.constexpr, MOST_GUIDES: tl.constexpr, KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend one tile, TILE positions of HEADS query heads that share one of the `Lists`.

    Of its heads, `first_of_list` are left to another launch, and so are those after PARTS times HEADS more.
    Some keys come first: those that need a mask, at the end of the dense span and of the list. FIXED is for calls in
    which every row sees all other keys. The maximum that each row has by then stays fixed for the rest: any origin of
    the exponents gives the same softmax, so the long loop neither reduces over keys nor rescales the accumulators,
    which takes about as long as its products and keeps blocks small. Only where far larger logits come later, and
    weights approach what the dtype can hold, the tile is attended again with a running maximum.

    Program (tile, last first; part of the query heads of a KV head; batch entry and KV head).
    """
    # 1. Addresses: the rows of the tile, their keys and values, the list and its limits.
    scale, log2_max_weight = float32(scale), float32(log2_max_weight)
    unit = tl.maximum(scale, 1e-30)
    softcap = float32(softcap) / unit
    tiles_per_segment: tl.constexpr = SEGMENT // TILE
    heads_of_list: tl.constexpr = GROUP_SIZE // LISTS_PER_KV_HEAD
    tile = first_segment * tiles_per_segment + tl.num_programs(0) - 1 - tl.program_id(0)
    segment = tile // tiles_per_segment
    batch = (tl.program_id(2) // kv_heads).to(tl.int64)
    kv_head = (tl.program_id(2) % kv_heads).to(tl.int64)
    which = tl.program_id(1) // PARTS
    place = (tl.program_id(2) * LISTS_PER_KV_HEAD + which) * segments + segment - first_segment
    end_head = (which + 1) * heads_of_list

    first_head = which * heads_of_list + first_of_list + tl.program_id(1) % PARTS * HEADS
    of_kv_head = kv_head * GROUP_SIZE
    places = _places(tile, first_head, end_head, of_kv_head, queries, HEADS, TILE, BLOCK_M)
    query += batch * query_stride_b
    rows = _load_queries(query, places, query_stride_h, query_stride_n, D, BLOCK_D)
    key += batch * key_stride_b + kv_head * key_stride_h
    value += batch * value_stride_b + kv_head * value_stride_h
    padding += batch * padding_stride_b
    terms = mask_terms(
        batch, offset, window, query_documents, query_documents_stride_b, key_documents, key_documents_stride_b,
        mask, mask_stride_b, mask_stride_h, mask_stride_n, mask_stride_k,
    )  # fmt: skip

    limit = None
    if BOUNDED:
        guide_lse += (batch * kv_heads + kv_head) * GUIDE_HEADS * guides_per_head
        owner += (batch * kv_heads + kv_head) * GROUP_SIZE * queries
        limit = _limits(
            guide_lse, owner, places, which, segment, of_kv_head, queries, guides_per_head, log2_max_weight, unit,
            POOL, GUIDE_HEADS, MOST_GUIDES,
        )  # fmt: skip
    lane = tl.arange(0, BLOCK_N)
    rows_differ: tl.constexpr = WINDOW or DOCUMENTS or MASK

    _, low, high = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    end = high
    if CAUSAL:
        end = tl.maximum(low, clip(tl.minimum((tile + 1) * TILE, queries) + offset, keys))
    listed = tl.load(count + place)
    index += place.to(tl.int64) * capacity
    log_weights += place.to(tl.int64) * capacity

    # 2. Masked prologue: the end of the dense span, and of the list; at least one key, so that rows have a maximum.
    open_end = low
    if FIXED and not HAS_PADDING:
        seen_by_all = tl.minimum(end - 1, tile * TILE + offset + 1) if CAUSAL else end - 1
        open_end += tl.maximum(seen_by_all - low, 0) // BLOCK_N * BLOCK_N
    whole = tl.maximum(listed - 1, 0) // BLOCK_N * BLOCK_N
    tensors, lists = (key, value, padding), (rows_of_keys, index, log_weights)
    maximum, mass, total = _masked_prologue(
        rows, places, tensors, lists, terms, limit, open_end, end, whole, listed, unit, softcap,
        KEY_STRIDE, VALUE_STRIDE, CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, MASK, SAMPLED, SOFTCAP,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    if FIXED:
        maximum, mass, total = lower_weights(maximum, mass, total, unit, rows.dtype)

    # 3. Unmasked loop: what is left of the dense span at places below 0, then of the list.
    # Few warps wait for what they load, so weights are loaded while the block before is at work.
    ahead = _load_log_weights(log_weights, low - open_end + lane, whole, SAMPLED)
    for start in range(low - open_end, whole, BLOCK_N):
        column = start + lane
        chosen = tl.load(tl.where(start < 0, rows_of_keys + open_end, index) + column)
        bias = None
        if SAMPLED:
            bias = ahead.to(tl.float32) * (1 / unit)
        ahead = _load_log_weights(log_weights, column + BLOCK_N, whole, SAMPLED)
        seen = None
        if rows_differ:
            seen = see(terms, places[0], places[1], places[2], chosen, lane < BLOCK_N, False, WINDOW, DOCUMENTS, MASK)
        maximum, mass, total = add_keys(
            maximum, mass, total, rows, key, value, chosen, None, seen, bias, limit,
            unit, softcap, KEY_STRIDE, VALUE_STRIDE, FIXED, rows_differ, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip

    # 4. Overflow retry: with a running maximum, where far larger logits came later than the fixed one.
    if FIXED and _outgrew(maximum, mass, rows.dtype):
        maximum, mass, total = _masked_prologue(
            rows, places, tensors, lists, terms, limit, low, end, 0, listed, unit, softcap,
            KEY_STRIDE, VALUE_STRIDE, CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, MASK, SAMPLED, SOFTCAP,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip

    # 5. Epilogue: output, log-sum-exp and visited pairs.
    seen_keys = round_up(end - low, KEY_BLOCK) + round_up(listed, KEY_BLOCK)
    # Held across the loops, places would take registers from them; what is added is 0, but the compiler does not know.
    tile += tl.minimum(seen_keys, 0)
    output += batch * output_stride_b
    lse += batch * kv_heads * GROUP_SIZE * queries
    visited += batch * kv_heads * GROUP_SIZE * tiles
    places = _places(tile, first_head, end_head, of_kv_head, queries, HEADS, TILE, BLOCK_M)
    _write(
        output, lse, visited, places, maximum, mass, total, seen_keys, tile, tiles, queries, unit,
        output_stride_h, output_stride_n, TILE, DV,
    )  # fmt: skip
