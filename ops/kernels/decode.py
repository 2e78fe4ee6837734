"""Dense attention of requests of few queries, whose keys are read where they are: packed, or through a block table.

The keys of a request are split between programs, and a second kernel adds up what these found (flash decoding).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton import next_power_of_2

from ..requests import Request
from ..upload import uploaded
from .arguments import LOG2_E, padded
from .attend import add_loaded
from .helpers import LN_2, NO_KEY, finite_or_zero, float32
from .launch import launch
from .plan import Tensors, planned
from .tiling import decode_tiling, decoded_rows, keys_per_split, multiprocessors, shared_memory
from .variants import kernel

SPLITS = tl.constexpr(16)
"""Splits that are added up at once."""
REQUESTS = tl.constexpr(256)
"""Requests whose last splits are compared at once."""


def decode(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    table: torch.Tensor | None,
    requests: Sequence[Request],
    window_size: Sequence[int],
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    """Fill the rows of requests in `out` by dense attention; shapes as in ``s2o_compile.attention_varlen``.

    Nothing but the keys of a request that a query may see, and their pages, is read.

    Args:
        out: [T, Hq, Dv].
        query: [T, Hq, D], of at least 1 channel.
        key: [Tk, Hkv, D], or pages [blocks, block size, Hkv, D] with a `table`.
        value: As `key`, of Dv channels, at least 1.
        table: [N, M], the pages of each request.
        requests: At least one, each of a few queries, 1 at least.
        window_size: (left, right), `bounded`.
        scale: Factor of the logits, above 0.
        softcap: Bound of the logits, 0 for none.
        sinks: [Hq], None for none.
    """
    left, right = window_size
    queries = [request.query_count for request in requests]
    keys = [request.key_count for request in requests]
    seen = keys if left < 0 else [min(pair[0], left + pair[1]) for pair in zip(keys, queries, strict=True)]
    most = next_power_of_2(max(queries))
    lists = key.shape[-2] * _parts(query, key, most)[1]
    size = keys_per_split(sum(seen), lists, multiprocessors(query.device))
    ends = list(itertools.accumulate(-(-count // size) for count in seen))
    splits = next_power_of_2(ends[-1]) if max(seen) > size else 0
    rows = [request.rows.start for request in requests]
    numbers = uploaded([*rows, *queries, *keys, *_starts_of_keys(table, requests), *ends], query.device)
    # Of how many rows, keys and pages there are the plan knows nothing.
    tensors = (
        out[:1], query[:1], key[:1], value[:1], None if table is None else table.as_strided((1,), table.stride()[1:]),
        numbers, None if sinks is None else sinks.contiguous(),
    )  # fmt: skip
    planned(_decode, tensors, query.device, len(requests), most, splits, size, left, right, scale, softcap)


def _starts_of_keys(table: torch.Tensor | None, requests: Sequence[Request]) -> list[int]:
    """Where the keys of each request start: among those that are packed, or its first page in the memory of a table."""
    if table is None:
        return [request.keys.start for request in requests]
    row = table.stride(0)
    return [request.number * row for request in requests]


def _parts(query: torch.Tensor, key: torch.Tensor, queries: int) -> tuple[int, int]:
    """How many of the query heads of a KV head a program takes, and how many programs that is for all of them."""
    group_size = query.shape[1] // key.shape[-2]
    heads = min(group_size, max(1, decoded_rows(key.element_size()) // queries))
    return heads, -(-group_size // heads)


def _decode(
    tensors: Tensors,
    device: torch.device,
    requests: int,
    queries: int,
    splits: int,
    size: int,
    left: int,
    right: int,
    scale: float,
    softcap: float,
) -> None:
    """`decode` of requests of so many `queries` at most, in so many `splits` of a `size` at most; 0 for one of each."""
    out, query, key, value, table, numbers, sinks = tensors
    (_, heads, channels), kv_heads, wide = query.shape, key.shape[-2], value.shape[-1]
    heads_at_once, parts = _parts(query, key, queries)
    tiling = decode_tiling(max(channels, wide), key.element_size(), heads_at_once * queries, shared_memory(device))
    partial, lse = out, out
    if splits:
        partial = query.new_empty(splits, heads * queries, wide, dtype=torch.float32)
        lse = query.new_empty(splits, heads * queries, dtype=torch.float32)
    of_rows = (numbers, numbers if sinks is None else sinks, out, *out.stride()[:2], partial, lse)
    shared = {
        "requests": requests, "left": left, "LEFT": left >= 0, "SINKS": sinks is not None, "QUERIES": queries,
        "OUT_STRIDE_D": out.stride(2), "DV": wide, "BLOCK_DV": padded(wide),
    }  # fmt: skip
    launch(
        decode_kernel, ((splits or requests) * kv_heads * parts,),
        *of_rows, query, key, value, numbers if table is None else table,
        *query.stride(), *_strides(key), *_strides(value), 0 if table is None else table.stride(0),
        kv_heads=kv_heads, keys_per_split=size, right=right, scale=scale * LOG2_E, softcap=softcap * LOG2_E, **shared,
        PAGE_SIZE=0 if table is None else key.shape[1], RIGHT=right >= 0, SOFTCAP=softcap > 0, SPLIT=splits > 0,
        GROUP_SIZE=heads // kv_heads, HEADS=heads_at_once, PARTS=parts, D=channels, BLOCK_D=padded(channels),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        **tiling.arguments,
    )  # fmt: skip
    if splits:
        launch(sum_kernel, (requests * heads * queries,), *of_rows, heads=heads, **shared, num_warps=2)


def _strides(pool: torch.Tensor) -> tuple[int, ...]:
    """Of pages, slots, heads and channels; without pages the first is 0."""
    return pool.stride() if pool.dim() == 4 else (0, *pool.stride())


@triton.jit
def _find_split(numbers, requests, split):
    """Of a split among those of all requests: its request, or how many there are, and how many it has before this."""
    ends = numbers + 4 * requests
    request, before = 0, 0
    for low in range(0, requests, REQUESTS):
        lane = low + tl.arange(0, REQUESTS)
        end = tl.load(ends + lane, mask=lane < requests, other=NO_KEY)
        is_before = end <= split
        request += tl.sum(is_before.to(tl.int32), 0)
        before = tl.maximum(before, tl.max(tl.where(is_before, end, 0), 0))
    return request, split - before


@triton.jit
def _load_request(numbers, requests, request, left, LEFT: tl.constexpr):
    """Of a request: its first row, how many queries and keys, where its keys start, and the first that is seen."""
    numbers += request
    row = tl.load(numbers)
    queries = tl.load(numbers + requests)
    keys = tl.load(numbers + 2 * requests)
    start = tl.load(numbers + 3 * requests)
    first = tl.maximum(0, keys - queries - left) if LEFT else 0
    return row, queries, keys, start, first


@triton.jit
def _find_keys(column, inside, table, start, table_stride, PAGE_SIZE: tl.constexpr):
    """The pages and slots of keys `column` [N] of a request, int64; where they are packed, all in page 0."""
    if PAGE_SIZE > 0:
        place = start + (column // PAGE_SIZE).to(tl.int64) * table_stride
        page, slot = tl.load(table + place, mask=inside, other=0).to(tl.int64), (column % PAGE_SIZE).to(tl.int64)
    else:
        page, slot = tl.zeros_like(column).to(tl.int64), start + column.to(tl.int64)
    return page, slot


@triton.jit
def _load_rows(base, places, inside, STRIDE_D: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [N, BLOCK_D] that start `places` [N] elements after `base`; zeros where not `inside` and past channel D."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + places[:, None] + (channels.to(tl.int64) * STRIDE_D)[None, :]
    return tl.load(pointers, mask=inside[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def _divide(total, mass, maximum, sinks, head, real, SINKS: tl.constexpr):
    """Sums of values [M, N] over sums of weights, with sinks among these, under a `maximum` in units of log 2, [M]."""
    if SINKS:
        sink = tl.load(sinks + head, mask=real).to(tl.float32) / LN_2
        mass += tl.exp2(sink - finite_or_zero(maximum))
    return total / tl.where(mass == 0, 1.0, mass)[:, None]


@kernel
def decode_kernel(
    numbers, sinks, out, out_stride_n, out_stride_h, partial, lse, query, key, value, table,
    query_stride_n, query_stride_h, QUERY_STRIDE_D: tl.constexpr,
    key_stride_p, KEY_STRIDE: tl.constexpr, key_stride_h, KEY_STRIDE_D: tl.constexpr,
    value_stride_p, VALUE_STRIDE: tl.constexpr, value_stride_h, VALUE_STRIDE_D: tl.constexpr,
    table_stride, requests, keys_per_split, kv_heads, left, right, scale, softcap,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, SPLIT: tl.constexpr,
    PAGE_SIZE: tl.constexpr, QUERIES: tl.constexpr, GROUP_SIZE: tl.constexpr, HEADS: tl.constexpr,
    PARTS: tl.constexpr, OUT_STRIDE_D: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend the queries of one request, in some heads of one KV head, to a split of its keys.

    Program (request or split, slowest; KV head; part of its query heads). Without splits the result is written to
    `out`, and else, normalised and with a log-sum-exp in units of log 2, to `partial` and `lse` by split, head and
    query. Programs past the last split do nothing.
    """
    # 1. Addresses.
    part, kv_head = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS % kv_heads).to(tl.int64)
    split = tl.program_id(0) // (PARTS * kv_heads)
    request, place = split, 0
    if SPLIT:
        request, place = _find_split(numbers, requests, split)
        if request >= requests:
            return
    first_row, queries, keys, start, first = _load_request(numbers, requests, request, left, LEFT)
    first += place * keys_per_split
    end = tl.minimum(keys, first + keys_per_split)
    unit = tl.maximum(float32(scale), 1e-30)
    softcap = float32(softcap) / unit
    row = tl.arange(0, BLOCK_M)
    position, head = row % QUERIES, part * HEADS + row // QUERIES
    real = (row < HEADS * QUERIES) & (head < GROUP_SIZE) & (position < queries)
    head = kv_head * GROUP_SIZE + head
    at_row = (first_row + position).to(tl.int64)
    rows = _load_rows(query, at_row * query_stride_n + head * query_stride_h, real, QUERY_STRIDE_D, D, BLOCK_D)
    key += kv_head * key_stride_h
    value += kv_head * value_stride_h

    # 2. Loop. Every key from the first one on is seen by some row, as each sees those around its own.
    own = position + (keys - queries)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for low in range(first, end, BLOCK_N):
        column = low + tl.arange(0, BLOCK_N)
        inside = column < end
        page, slot = _find_keys(column, inside, table, start, table_stride, PAGE_SIZE)
        some_keys = _load_rows(key, page * key_stride_p + slot * KEY_STRIDE, inside, KEY_STRIDE_D, D, BLOCK_D)
        some_values = _load_rows(
            value, page * value_stride_p + slot * VALUE_STRIDE, inside, VALUE_STRIDE_D, DV, BLOCK_DV
        )
        seen = inside[None, :]
        if LEFT and QUERIES > 1:
            seen = seen & (column[None, :] >= (own - left)[:, None])
        if RIGHT and QUERIES > 1:
            seen = seen & (column[None, :] <= (own + right)[:, None])
        maximum, mass, total = add_loaded(
            maximum, mass, total, rows, some_keys, some_values, seen, None, None, unit, softcap, False, SOFTCAP,
            PRECISION,
        )  # fmt: skip
    maximum *= unit

    # 3. Epilogue.
    if SPLIT:
        total = _divide(total, mass, maximum, sinks, head, real, False)
        places = (split.to(tl.int64) * kv_heads * GROUP_SIZE + head) * QUERIES + position
        channels = tl.arange(0, BLOCK_DV)
        pointers = partial + places[:, None] * DV + channels[None, :]
        tl.store(pointers, total, mask=real[:, None] & (channels < DV)[None, :])
        tl.store(lse + places, maximum + tl.log2(mass), mask=real)
    else:
        total = _divide(total, mass, maximum, sinks, head, real, SINKS)
        channels = tl.arange(0, BLOCK_DV)
        places = at_row * out_stride_n + head * out_stride_h
        pointers = out + places[:, None] + (channels.to(tl.int64) * OUT_STRIDE_D)[None, :]
        tl.store(pointers, total.to(out.dtype.element_ty), mask=real[:, None] & (channels < DV)[None, :])


@kernel
def sum_kernel(
    numbers, sinks, out, out_stride_n, out_stride_h, partial, lse, heads, requests, left,
    LEFT: tl.constexpr, SINKS: tl.constexpr, QUERIES: tl.constexpr, OUT_STRIDE_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Add up what the splits of a request have found. Program (request, slowest; head; query)."""
    rows = heads * QUERIES
    request, row = tl.program_id(0) // rows, tl.program_id(0) % rows
    head, position = (row // QUERIES).to(tl.int64), row % QUERIES
    first_row, queries, _, _, _ = _load_request(numbers, requests, request, left, LEFT)
    if position >= queries:
        return
    ends = numbers + 4 * requests + request
    begin, end = tl.load(ends - 1, mask=request > 0, other=0), tl.load(ends)
    channels = tl.arange(0, BLOCK_DV)
    maximum = tl.full([1], float("-inf"), tl.float32)
    mass = tl.zeros([1], tl.float32)
    total = tl.zeros([1, BLOCK_DV], tl.float32)
    for low in range(begin, end, SPLITS):
        split = low + tl.arange(0, SPLITS)
        inside = split < end
        places = split.to(tl.int64) * rows + row
        of_splits = tl.load(lse + places, mask=inside, other=float("-inf"))
        outputs = _load_rows(partial, places * DV, inside, 1, DV, BLOCK_DV)
        before, maximum = maximum, tl.maximum(maximum, tl.max(of_splits, 0))
        decay = tl.exp2(before - finite_or_zero(maximum))
        weights = tl.exp2(of_splits - finite_or_zero(maximum))
        mass = mass * decay + tl.sum(weights, 0)
        total = total * decay[:, None] + tl.sum(weights[:, None] * outputs, 0)[None, :]
    total = _divide(total, mass, maximum, sinks, head + tl.zeros([1], tl.int64), None, SINKS)
    pointers = out + (first_row + position).to(tl.int64) * out_stride_n + head * out_stride_h
    pointers += (channels.to(tl.int64) * OUT_STRIDE_D)[None, :]
    tl.store(pointers, total.to(out.dtype.element_ty), mask=(channels < DV)[None, :])
