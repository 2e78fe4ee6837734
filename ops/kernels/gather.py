"""Rows of a request brought together from its pages by a few programs, which leave the rest of a GPU to others."""

from __future__ import annotations

import torch
import triton.language as tl

from .arguments import padded
from .launch import launch
from .tiling import GATHERED_BYTES, gathering_programs
from .variants import kernel


def gather(out: torch.Tensor, pool: torch.Tensor, pages: torch.Tensor, queries: int) -> None:
    """Fill `out` [n, H, D] with the first n rows of `pages`, one after the other.

    Args:
        out: Contiguous.
        pool: [blocks, block size, H, D] of any strides.
        pages: Those of the request, as many as n rows need.
        queries: Of the request. The fewer there are, the sooner rows are needed, so that more programs copy.
    """
    rows, heads, channels = out.shape
    width = padded(channels)
    at_once = max(1, GATHERED_BYTES // (width * pool.element_size()))
    programs = min(gathering_programs(queries, pool.device), -(-rows * heads // at_once))
    launch(
        gather_kernel, (programs,), out, pool, pages, *pool.stride(), pages.stride(0),
        kv_heads=heads, size=pool.shape[1], rows=rows * heads, D=channels, BLOCK_M=at_once, BLOCK_D=width, num_warps=8,
    )  # fmt: skip


@kernel
def gather_kernel(
    out, pool, pages, stride_block, stride_slot, stride_head, stride_channel, stride_page, kv_heads, size, rows,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write `rows` of all heads. Program (one of those that share the rows): every so many blocks of BLOCK_M."""
    channel = tl.arange(0, BLOCK_D)
    for start in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        slot = row // kv_heads
        page = tl.load(pages + slot // size * stride_page, mask=row < rows, other=0).to(tl.int64)
        place = page * stride_block + (slot % size).to(tl.int64) * stride_slot
        place += (row % kv_heads).to(tl.int64) * stride_head
        mask = (row < rows)[:, None] & (channel < D)[None, :]
        block = tl.load(pool + place[:, None] + (channel.to(tl.int64) * stride_channel)[None, :], mask=mask)
        tl.store(out + row.to(tl.int64)[:, None] * D + channel[None, :], block, mask=mask)
