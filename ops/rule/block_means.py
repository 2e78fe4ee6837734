"""Block means: one key and one value that stand for the keys of a block that are not visited."""

from __future__ import annotations

import torch

from ..geometry import BLOCK
from ..visibility import masked


def block_means(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Mean over the valid keys of each block.

    Args:
        x: Keys or values [..., Lk, D].
        valid: Which keys count, [..., Lk] boolean, broadcastable; None for all.

    Returns:
        [..., ceil(Lk / BLOCK), D]; zeros for a block without valid keys.
    """
    length, x = x.shape[-2], masked(x, valid)
    if valid is None:
        valid = torch.ones(length, dtype=torch.bool, device=x.device)
    padding = -length % BLOCK
    x = x if x.dtype == torch.float64 else x.float()
    blocks = torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(-2, (-1, BLOCK)).sum(-2)
    count = torch.nn.functional.pad(valid, (0, padding)).unflatten(-1, (-1, BLOCK)).sum(-1)
    return blocks / count.clamp_min(1)[..., None]
