"""How much of dense attention's work a call did, counted as kernels count it, padding of blocks included."""

from __future__ import annotations

import torch

from .geometry import round_up


def dense_pairs(queries: int, keys: int, is_causal: bool, causal_offset: int, tile: int) -> int:
    """The (query, key) pairs that a dense kernel visits for one head, in tiles and blocks of keys."""
    total = 0
    for first in range(0, queries, tile):
        end = min(first + tile, queries)
        seen = min(keys, max(0, end + causal_offset)) if is_causal else keys
        total += (end - first) * round_up(seen)
    return total


def density(
    visited: torch.Tensor, queries: int, keys: int, is_causal: bool, causal_offset: int, tile: int
) -> torch.Tensor:
    """Visited pairs [B, Hq, tiles] over the pairs that a dense kernel visits, per batch and head: [B, Hq]."""
    return visited.sum(-1) / max(1, dense_pairs(queries, keys, is_causal, causal_offset, tile))
