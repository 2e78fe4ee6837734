"""The positions of keys as a tensor, for kernels that look up where each key is."""

from __future__ import annotations

import torch
import triton.language as tl

from .launch import launch
from .variants import kernel

_BLOCK = 1024


def positions(keys: int, device: torch.device) -> torch.Tensor:
    """The positions of so many keys [Lk] int32, by a launch, which a plan can repeat."""
    result = torch.empty(keys, dtype=torch.int32, device=device)
    launch(positions_kernel, (-(-keys // _BLOCK),), result, keys, BLOCK_N=_BLOCK, num_warps=4)
    return result


@kernel
def positions_kernel(result, keys, BLOCK_N: tl.constexpr):
    """Write the number of each place. Program (block of places)."""
    place = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(result + place, place, mask=place < keys)
