"""MInference's vertical-slash pattern (arXiv 2407.02490), with the budget that it falls back to for every head.

The pattern's search per head over a calibration text is left out: each head gets the same budget, on the dial.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from .blocks import last_attention
from .lines import largest, slash_keys, slash_sums
from .visit import Visit

TILE = 64
LAST_QUERIES = 64
VERTICALS, SLASHES = 1000, 6096
FIRST_VERTICALS, FIRST_SLASHES = 30, 100
"""As in the published code; the first keys and the nearest distances are always visited."""


def vertical_slash(query: torch.Tensor, key: torch.Tensor, scale: float, budgets: Sequence[float]) -> Iterator[Visit]:
    """Visit the keys and the distances to which the last 64 queries pay the most attention.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        budgets: Multiples of the published budget of 1,000 keys and 6,096 distances.
    """
    attention = last_attention(query, key, scale, LAST_QUERIES)
    vertical, slash = attention.sum(0), slash_sums(attention)
    vertical[:FIRST_VERTICALS] = slash[:FIRST_SLASHES] = math.inf
    starts = torch.arange(0, len(key), TILE, device=key.device)
    causal = torch.arange(len(key), device=key.device) < starts[:, None] + TILE
    for budget in budgets:
        verticals = largest(vertical, max(FIRST_VERTICALS, round(budget * VERTICALS)))
        distances = largest(slash, max(FIRST_SLASHES, round(budget * SLASHES)))
        mask = slash_keys(distances, TILE) | (verticals & causal)
        yield Visit(mask, TILE, 1, 2 * len(attention) * key.numel())
