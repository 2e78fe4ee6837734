"""Dense attention under the terms of a mask, which is not written out: what no row of a tile sees is skipped."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..visibility import Visibility
from .arguments import LOG2_E, padded
from .attend import MAX_MASS, MAX_MASS_FLOAT16, add_keys, lower_weights
from .helpers import LN_2, NO_KEY, float32, load_padding, mask_terms, see
from .launch import launch
from .plan import Tensors, planned
from .tiling import dense_tiling, shared_memory
from .variants import kernel

SCANNED = tl.constexpr(1024)
"""Keys whose padding or documents are read at once."""


def attend_densely(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Visibility, scale: float, softcap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense attention without a general mask, and its log-sum-exp; shapes as in `ops.operator`, a scale above 0.

    Returns:
        Output [B, Hq, Lq, Dv], stored as [B, Lq, Hq, Dv], and log-sum-exp [B, Hq, Lq], float32.
    """
    operands = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    masks = (None if x is None else x.contiguous() for x in visibility.tensors[:3])
    batch, heads, queries, _ = query.shape
    output = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, queries, dtype=torch.float32)
    terms = visibility.with_tensors(None, None, None, None)
    planned(_attend, (*operands, *masks, output, lse), query.device, terms, scale, softcap)
    return output, lse


def _attend(tensors: Tensors, device: torch.device, terms: Visibility, scale: float, softcap: float) -> None:
    query, key, value, padding, of_queries, of_keys, output, lse = tensors
    (batch, heads, queries, channels), (_, kv_heads, keys, _), wide = query.shape, key.shape, value.shape[3]
    absent = key.new_empty(1, 1, dtype=torch.bool)
    masks = [absent if x is None else x for x in (padding, of_queries, of_keys)]
    tiling = dense_tiling(max(channels, wide), key.element_size(), shared_memory(device))
    launch(
        dense_kernel, (-(-queries // tiling.rows) * batch * heads,),
        query, key, value, *masks, output, lse,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *(x.stride(0) for x in masks),
        *output.stride()[:3],
        heads, queries, keys, terms.causal_offset, terms.window or 0, scale * LOG2_E, softcap * LOG2_E,
        HEADS_PER_KV_HEAD=heads // kv_heads,
        CAUSAL=terms.is_causal, HAS_PADDING=padding is not None,
        WINDOW=terms.window is not None, DOCUMENTS=of_queries is not None, SOFTCAP=softcap > 0,
        D=channels, BLOCK_D=padded(channels), DV=wide, BLOCK_DV=padded(wide),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        **tiling.arguments,
    )  # fmt: skip


@triton.jit
def _scan(
    padding, key_documents, low, high, least, most,
    HAS_PADDING: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Of the keys from `low` to `high`, the first that some row may see, the end of those, and of those hidden between.

    `least` and `most` bound the documents of the rows. Bounds are safe: keys between may be hidden from all rows.
    """
    lane = tl.arange(0, SCANNED)
    first, end = high, low
    for start in range(low, high, SCANNED):
        column = start + lane
        seen = load_padding(padding, column, column < high, HAS_PADDING)
        if DOCUMENTS:
            document = tl.load(key_documents + column, mask=seen, other=0)
            seen = seen & (document >= least) & (document <= most)
        first = tl.minimum(first, tl.min(tl.where(seen, column, NO_KEY), 0))
        end = tl.maximum(end, tl.max(tl.where(seen, column + 1, 0), 0))
    hidden = first
    for start in range(first, end, SCANNED):
        column = start + lane
        inside = column < end
        seen = load_padding(padding, column, inside, HAS_PADDING)
        if DOCUMENTS:
            document = tl.load(key_documents + column, mask=seen, other=0)
            seen = seen & (document == least) & (document == most)
        hidden = tl.maximum(hidden, tl.max(tl.where(inside & (seen == 0), column + 1, 0), 0))
    return first, end, hidden


@triton.jit
def _add_masked(
    maximum, mass, total, rows, places, tensors, terms, low, high, unit, softcap,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr,
    WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr, SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys from `low` to `high` to the online softmax, each where the terms let a row see it."""
    head, position, real = places
    key, value, padding = tensors
    for start in range(low, high, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = load_padding(padding, column, column < high, HAS_PADDING)
        seen = see(terms, head, position, real, column, inside, CAUSAL, WINDOW, DOCUMENTS, False)
        maximum, mass, total = add_keys(
            maximum, mass, total, rows, key, value, column, inside, seen, None, None, unit, softcap,
            KEY_STRIDE, VALUE_STRIDE, False, WINDOW or DOCUMENTS, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    return maximum, mass, total


@kernel
def dense_kernel(
    query, key, value, padding, query_documents, key_documents, output, lse,
    query_stride_b, query_stride_h, query_stride_n, key_stride_b, key_stride_h, KEY_STRIDE: tl.constexpr,
    value_stride_b, value_stride_h, VALUE_STRIDE: tl.constexpr,
    padding_stride_b, query_documents_stride_b, key_documents_stride_b,
    output_stride_b, output_stride_h, output_stride_n,
    heads, queries, keys, offset, window, scale, softcap, HEADS_PER_KV_HEAD: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PADDING: tl.constexpr, WINDOW: tl.constexpr, DOCUMENTS: tl.constexpr,
    SOFTCAP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend BLOCK_M consecutive queries of one head.

    The keys that some row of the tile sees lie in [low, high), and all rows see all keys in [open_low, open_high). The
    others are attended first, masked; the maximum that each row has by then stays fixed for the rest, as in
    `attend_kernel`, and as there a tile is attended again where weights outgrow it.

    Program (tile, last first; batch entry and head, slowest).
    """
    # 1. Addresses.
    unit = tl.maximum(float32(scale), 1e-30)
    softcap = float32(softcap) / unit
    tiles = (queries + BLOCK_M - 1) // BLOCK_M
    place = tl.program_id(0) // tiles
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch, head = (place // heads).to(tl.int64), (place % heads).to(tl.int64)
    kv_head = head // HEADS_PER_KV_HEAD
    first_row = tile * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, queries) - 1
    position = first_row + tl.arange(0, BLOCK_M)
    real = position < queries
    channels = tl.arange(0, BLOCK_D)
    query += batch * query_stride_b + head * query_stride_h
    pointers = query + position.to(tl.int64)[:, None] * query_stride_n + channels[None, :]
    rows = tl.load(pointers, mask=real[:, None] & (channels < D)[None, :], other=0.0)
    key += batch * key_stride_b + kv_head * key_stride_h
    value += batch * value_stride_b + kv_head * value_stride_h
    padding += batch * padding_stride_b
    terms = mask_terms(
        batch, offset, window, query_documents, query_documents_stride_b, key_documents, key_documents_stride_b,
        padding, 0, 0, 0, 0,
    )  # fmt: skip

    # 2. Bounds.
    low, high = 0, keys
    open_low, open_high = 0, keys
    if CAUSAL:
        high = tl.maximum(0, tl.minimum(keys, last_row + offset + 1))
        open_high = tl.maximum(0, tl.minimum(keys, first_row + offset + 1))
    if WINDOW:
        low = tl.minimum(high, tl.maximum(0, first_row + offset - window + 1))
        open_low = tl.maximum(0, last_row + offset - window + 1)
    if HAS_PADDING or DOCUMENTS:
        least, most = 0, 0
        if DOCUMENTS:
            of_rows = tl.load(query_documents + batch * query_documents_stride_b + position, mask=real, other=0)
            first_of_rows = tl.load(query_documents + batch * query_documents_stride_b + first_row)
            least = tl.min(tl.where(real, of_rows, first_of_rows), 0)
            most = tl.max(tl.where(real, of_rows, first_of_rows), 0)
        documents = key_documents + batch * key_documents_stride_b
        low, high, hidden = _scan(padding, documents, low, high, least, most, HAS_PADDING, DOCUMENTS)
        open_low = tl.maximum(open_low, hidden)
    low = low // BLOCK_N * BLOCK_N
    open_low = tl.maximum(low, (open_low + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
    open_high = tl.minimum(open_high, high) // BLOCK_N * BLOCK_N
    # So that rows have a maximum to fix, the last block is masked in any case.
    open_high = tl.minimum(open_high, tl.maximum(high - 1, 0) // BLOCK_N * BLOCK_N)
    has_open = open_low < open_high
    open_low = tl.where(has_open, open_low, high)
    open_high = tl.where(has_open, open_high, high)

    # 3. Masked prologue: the last keys, and the first.
    places, tensors = (head, position, real), (key, value, padding)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    maximum, mass, total = _add_masked(
        maximum, mass, total, rows, places, tensors, terms, open_high, high, unit, softcap, KEY_STRIDE, VALUE_STRIDE,
        CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, SOFTCAP, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    maximum, mass, total = _add_masked(
        maximum, mass, total, rows, places, tensors, terms, low, open_low, unit, softcap, KEY_STRIDE, VALUE_STRIDE,
        CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, SOFTCAP, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
    )  # fmt: skip
    maximum, mass, total = lower_weights(maximum, mass, total, unit, rows.dtype)

    # 4. Unmasked loop.
    for start in range(open_low, open_high, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        maximum, mass, total = add_keys(
            maximum, mass, total, rows, key, value, column, None, None, None, None, unit, softcap,
            KEY_STRIDE, VALUE_STRIDE, True, False, SOFTCAP, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip

    # 5. Overflow retry.
    max_mass: tl.constexpr = MAX_MASS_FLOAT16 if rows.dtype == tl.float16 else MAX_MASS
    lost = (mass > max_mass) | ((maximum == float("-inf")) & (mass > 0))
    if tl.max(lost.to(tl.int32), 0) > 0:
        maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        maximum, mass, total = _add_masked(
            maximum, mass, total, rows, places, tensors, terms, low, high, unit, softcap, KEY_STRIDE, VALUE_STRIDE,
            CAUSAL, HAS_PADDING, WINDOW, DOCUMENTS, SOFTCAP, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip

    # 6. Epilogue.
    total = total / tl.where(mass == 0, 1.0, mass)[:, None]
    wide = tl.arange(0, BLOCK_DV)
    output += batch * output_stride_b + head * output_stride_h
    pointers = output + position.to(tl.int64)[:, None] * output_stride_n + wide[None, :]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=real[:, None] & (wide < DV)[None, :])
    lse += (batch * heads + head) * queries
    tl.store(lse + position, (maximum * unit + tl.log2(mass)) * LN_2, mask=real)
