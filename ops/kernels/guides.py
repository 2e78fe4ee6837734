"""Guides, pooled from queries in one pass over them."""

from __future__ import annotations

import torch
import triton.language as tl

from ..config import S2OConfig
from .arguments import padded
from .helpers import load_rows
from .launch import launch
from .variants import kernel

_ROWS = 16


def pool_guides(query: torch.Tensor, config: S2OConfig) -> torch.Tensor:
    """`rule.guides.pool_guides`, rounded once: query [B, Hkv, G, L, D], guides [B, Hkv, G or 1, ceil(L / pool), D]."""
    batch, kv_heads, group_size, length, size = query.shape
    together = group_size if config.ranking.guides == "kv_head" else 1
    if config.ranking.pool == together == 1:
        return query
    heads, per_head = group_size // together, -(-length // config.ranking.pool)
    guides = query.new_empty(batch, kv_heads, heads, per_head, size)
    launch(
        pool_kernel, (-(-per_head // _ROWS), heads, batch * kv_heads),
        query, guides,
        *query.stride()[:4], kv_heads, length, per_head,
        POOL=config.ranking.pool, TOGETHER=together,
        D=size, BLOCK_D=padded(size), BLOCK_N=_ROWS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return guides


@kernel
def pool_kernel(
    query, guides, stride_b, stride_kv, stride_h, stride_n, kv_heads, queries, per_head,
    POOL: tl.constexpr, TOGETHER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write means over POOL queries (fewer at a ragged end) of TOGETHER heads: guides [B, Hkv, guide heads, guides, D].

    Program (block of guides; head; batch entry and KV head).
    """
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), (tl.program_id(2) % kv_heads).to(tl.int64)
    query += batch * stride_b + kv_head * stride_kv + tl.program_id(1).to(tl.int64) * TOGETHER * stride_h
    guide = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for _ in range(TOGETHER):
        for place in tl.range(POOL, loop_unroll_factor=4):
            row = guide * POOL + place
            total += load_rows(query, row, row < queries, stride_n, D, BLOCK_D).to(tl.float32)
        query += stride_h
    count = tl.maximum(tl.minimum(queries - guide * POOL, POOL), 1) * TOGETHER
    total /= count.to(tl.float32)[:, None]
    row = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * per_head + guide
    channel = tl.arange(0, BLOCK_D)
    inside = (guide < per_head)[:, None] & (channel < D)[None, :]
    tl.store(guides + row[:, None] * D + channel[None, :], total.to(guides.dtype.element_ty), mask=inside)
