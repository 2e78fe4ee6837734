"""Block means, in one pass over keys or values."""

# mypy: ignore-errors
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from .call import Call, channels
from .helpers import KEY_BLOCK, load_padding, load_rows


def block_means(x: torch.Tensor, call: Call) -> torch.Tensor:
    """`ops.block_means.block_means` of a call's keys or values [B, Hkv, Lk, D], rounded once."""
    batch, groups, keys, size = x.shape
    means = x.new_empty(batch, groups, call.blocks, size)
    padding = call.masks[0]
    wrap_triton(means_kernel)[(call.blocks, batch * groups)](
        x, padding, means,
        *x.stride()[:3], padding.stride(0), groups, keys,
        HAS_PADDING=call.shared["HAS_PADDING"], D=size, BLOCK_D=channels(size), num_warps=4, num_stages=1,
    )  # fmt: skip
    return means


@triton.jit
def means_kernel(
    x,
    padding,
    means,
    stride_b,
    stride_h,
    stride_n,
    padding_stride_b,
    groups,
    keys,
    HAS_PADDING: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write means over the keys of each block that are not padding [B, groups, blocks, D], zeros where there are none.

    Program (block; batch entry and group).
    """
    batch, group = (tl.program_id(1) // groups).to(tl.int64), (tl.program_id(1) % groups).to(tl.int64)
    column = tl.program_id(0) * KEY_BLOCK + tl.arange(0, KEY_BLOCK)
    inside = load_padding(padding + batch * padding_stride_b, column, column < keys, HAS_PADDING)
    block = load_rows(x + batch * stride_b + group * stride_h, column, inside, stride_n, D, BLOCK_D)
    count = tl.maximum(tl.sum(inside.to(tl.int32), 0), 1)
    mean = tl.sum(block.to(tl.float32), 0) / count.to(tl.float32)
    channel = tl.arange(0, BLOCK_D)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(means + place * D + channel, mean.to(means.dtype.element_ty), mask=channel < D)
