"""What is added to the logits of guides, as digits in channels of their own: a product then gives the sum of both."""

from __future__ import annotations

import torch
import triton.language as tl

from .arguments import Arguments
from .helpers import LOG2_E, unit_scale
from .launch import launch
from .merge import MergedGuides
from .quantise import DIGITS, Operands, digit_unit
from .variants import kernel

_ROWS = 256


def fold(
    arguments: Arguments, operands: Operands, merged: MergedGuides, lse: torch.Tensor, neglected: torch.Tensor
) -> None:
    """Write the digits of guides [B, Hkv, lists, guides, channels], which are the last of these.

    They are those of `origins`, in units of products, so that a product is a logit less the log-sum-exp `lse`
    [B, Hkv, lists, guides], with the allowances for merging and for what the channels lack, `neglected` [B, Hkv].
    """
    guides = operands.guides
    batch, kv_heads, lists, count, width = guides.shape
    launch(
        fold_kernel, (-(-count // _ROWS), lists, batch * kv_heads),
        guides, operands.ranges, lse, merged.reach, neglected, count, arguments.shared["scale"],
        WIDTH=width, BLOCK_M=_ROWS, num_warps=4,
    )  # fmt: skip


@kernel
def fold_kernel(guides, ranges, lse, reach, neglected, rows, scale, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr):
    """Write the digits of guides. Program (block of guides; list; batch entry and KV head)."""
    place = tl.program_id(2)
    step = unit_scale(scale, ranges, place, tl.num_programs(2), True)
    correction = tl.load(neglected + place) * LOG2_E
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    of_list = (place * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * rows
    far = tl.load(reach + of_list + row, mask=row < rows, other=0.0)
    left = (tl.sqrt(far * far + correction * correction) - tl.load(lse + of_list + row, mask=row < rows)) / step
    first = guides + (of_list + row) * WIDTH + (WIDTH - DIGITS)
    for digit in tl.static_range(DIGITS):
        unit = digit_unit(digit)
        rounded = (left / unit).to(guides.dtype.element_ty)
        tl.store(first + digit, rounded, mask=row < rows)
        left -= rounded.to(tl.float32) * unit
