"""Guides and keys in float8, for ranking on GPUs whose tensor cores multiply it twice as fast."""

# mypy: ignore-errors
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.library import wrap_triton

from .call import channels
from .helpers import FLOAT8_MAX, load_rows

FLOAT8 = torch.float8_e4m3fn
_ROWS = 128


class Operands(NamedTuple):
    """What is multiplied to rank keys; `ranges` [2, B, Hkv] is how far guides and keys reach, read for float8 only."""

    guides: torch.Tensor
    key: torch.Tensor
    ranges: torch.Tensor

    @property
    def are_quantised(self) -> bool:
        """Whether they are in float8."""
        return self.key.dtype == FLOAT8


def ranking_operands(guides: torch.Tensor, key: torch.Tensor, softcap: float) -> Operands:
    """Guides [B, Hkv, guide heads, guides, D] and keys [B, Hkv, Lk, D], in float8 where that is worth it."""
    return quantise(guides, key) if ranks_in_float8(guides, softcap) else Operands(guides, key, guides)


def ranks_in_float8(guides: torch.Tensor, softcap: float) -> bool:
    """Whether such guides [..., D] rank in float8: half precision, no soft cap, sm_89 or later."""
    if not guides.is_cuda or guides.dtype == torch.float32 or softcap or guides.shape[-1] < 32:
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(guides.device) >= (8, 9)


def quantise(guides: torch.Tensor, key: torch.Tensor) -> Operands:
    """Guides and centred keys in float8.

    Taking the mean key from all keys shifts a query's logits by one number, which the softmax does not see; it takes
    away what large biases of single channels would cost in precision (SageAttention, arXiv 2410.02367).

    Args:
        guides: [B, Hkv, guide heads, guides, D].
        key: [B, Hkv, Lk, D].
    """
    mean = key.mean(-2, keepdim=True)
    least, most = key.aminmax(dim=-2, keepdim=True)
    furthest = torch.maximum(most - mean, mean - least).amax((2, 3))
    ranges = torch.stack([torch.linalg.vector_norm(guides, torch.inf, (2, 3, 4)), furthest]).float()
    origin = torch.zeros_like(mean)
    return Operands(
        _to_float8(guides, origin, ranges[0]), _to_float8(key[:, :, None], mean, ranges[1])[:, :, 0], ranges
    )


def _to_float8(x: torch.Tensor, origin: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    batch, groups, heads, length, size = x.shape
    result = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    wrap_triton(quantise_kernel)[(-(-length // _ROWS), heads, batch * groups)](
        x, origin, ranges, result,
        *x.stride()[:4], groups, length,
        D=size, BLOCK_D=channels(size), BLOCK_N=_ROWS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return result


@triton.jit
def quantise_kernel(
    x,
    origin,
    ranges,
    result,
    stride_b,
    stride_g,
    stride_h,
    stride_n,
    groups,
    length,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write (x - origin) in units of range / FLOAT8_MAX: x [B, groups, heads, length, D], origin [B, groups, D].

    Program (block of rows; head; batch entry and group).
    """
    batch, group = (tl.program_id(2) // groups).to(tl.int64), (tl.program_id(2) % groups).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_D)
    inside = (row < length)[:, None] & (channel < D)[None, :]
    rows = load_rows(x + batch * stride_b + group * stride_g + head * stride_h, row, row < length, stride_n, D, BLOCK_D)
    centre = tl.load(origin + tl.program_id(2) * D + channel, mask=channel < D, other=0.0)
    unit = tl.maximum(tl.load(ranges + tl.program_id(2)), 1e-30) / FLOAT8_MAX
    rows = (rows.to(tl.float32) - centre.to(tl.float32)[None, :]) / unit
    place = (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + head) * length
    tl.store(result + (place + row)[:, None] * D + channel[None, :], rows.to(tl.float8e4nv), mask=inside)
