"""Vertical lines: keys that every query visits. Slash lines: distances at which every query visits a key."""

from __future__ import annotations

import torch
from torch.nn.functional import pad


def slash_sums(attention: torch.Tensor) -> torch.Tensor:
    """The attention [R, L] of the last R queries, causal, summed by the distance of the key: [L]."""
    rows, length = attention.shape
    backwards = pad(attention.flip(0, 1), (0, rows)).contiguous()
    return backwards.as_strided((rows, length), (length + rows + 1, 1)).sum(0)


def slash_keys(distances: torch.Tensor, tile: int) -> torch.Tensor:
    """The keys that each tile of queries visits [tiles, L], if every query visits at these distances [L] boolean."""
    length = len(distances)
    below = pad(distances.long().cumsum(0), (1, 0))
    starts = torch.arange(0, length, tile, device=distances.device)
    nearest = starts[:, None] - torch.arange(length, device=distances.device)
    return below[(nearest + tile).clamp(0, length)] > below[nearest.clamp(0, length)]


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Which of the scores [N] are the `count` largest: [N] boolean."""
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen[scores.topk(min(count, len(scores))).indices] = True
    return chosen
