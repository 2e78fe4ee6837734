"""What is added to the logits of guides, as digits in channels of their own: a product then gives the sum of both."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import Arguments
from .helpers import LOG2_E, unit_scale
from .launch import launch
from .merge import MergedGuides, load_origins
from .quantise import DIGITS, Operands, digit_unit
from .variants import kernel

_ROWS = 256


def fold(
    arguments: Arguments, operands: Operands, merged: MergedGuides, lse: torch.Tensor, neglected: torch.Tensor
) -> None:
    """Write what is added to the logits of guides into their last channels [B, Hkv, lists, segments * most, channels].

    A product with a key, in units of products, is then a logit less the log-sum-exp `lse` [B, Hkv, lists,
    segments * most] of all channels, with what is allowed for merging and for what the channels lack, `neglected`
    [B, Hkv]. Guides of KV heads that are scored in all channels have digits too, which nobody reads.
    """
    batch, kv_heads, lists, segments = merged.counts.shape
    most = arguments.guides_of_segment
    launch(
        fold_kernel, (segments, lists, batch * kv_heads),
        operands.guides, operands.ranges, lse, merged.reach, neglected, merged.counts, arguments.shared["scale"],
        PER_SEGMENT=most, WIDTH=operands.guides.shape[-1], BLOCK_M=min(_ROWS, triton.next_power_of_2(most)),
        num_warps=4,
    )  # fmt: skip


@kernel
def fold_kernel(
    guides, ranges, lse, reach, neglected, count, scale,
    PER_SEGMENT: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write the digits of the guides of a segment. Program (segment; list; batch entry and KV head)."""
    place = tl.program_id(2)
    step = unit_scale(scale, ranges, place, tl.num_programs(2), True)
    correction = tl.load(neglected + place) * LOG2_E
    segment = (place * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    guides_of_segment = tl.load(count + segment)
    for start in range(0, guides_of_segment, BLOCK_M):
        slot = start + tl.arange(0, BLOCK_M)
        real = slot < guides_of_segment
        guide = segment * PER_SEGMENT + slot
        left = load_origins(lse, reach, guide, real, correction) / step
        target = guides + guide * WIDTH + (WIDTH - DIGITS)
        for digit in tl.static_range(DIGITS):
            unit = digit_unit(digit)
            rounded = (left / unit).to(guides.dtype.element_ty)
            tl.store(target + digit, rounded, mask=real)
            left -= rounded.to(tl.float32) * unit
