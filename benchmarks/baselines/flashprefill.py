"""FlashPrefill (arXiv 2603.06199, github.com/qhfan/FlashPrefill): blocks of keys by their mean and every query.

A block's score is the sum of the exponentials of its mean key's logits, over the queries of a tile that see all of it.
Blocks whose score reaches a share of the largest one are visited; there is no sorting.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, causal, pool, sinks_and_window
from .visit import Visit

ALPHA = 0.08
"""Of the largest score, as published for Qwen2 and Qwen2.5; 0.12 to 0.18 for other models."""
SINKS, WINDOW = 2, 4
"""Blocks that are always visited, the first ones and the latest ones, as published."""
LAST_BLOCKS = 2
"""Blocks of queries at the end that attend densely, as published: a crutch."""


def flashprefill(
    query: torch.Tensor, key: torch.Tensor, scale: float, alphas: Sequence[float], last_blocks: int = 0
) -> Iterator[Visit]:
    """Visit the blocks whose score reaches a share of the largest, the first and the latest ones.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        alphas: Shares of the largest score; 0 is dense attention.
        last_blocks: Blocks of queries at the end that attend densely.
    """
    mean_key = pool(key)
    blocks = len(mean_key)
    positions = torch.arange(len(key), device=key.device)
    whole = positions[:, None] >= (torch.arange(blocks, device=key.device) + 1) * BLOCK - 1
    energy = block_energy((query @ mean_key.T * scale).masked_fill(~whole, -torch.inf), BLOCK)
    allowed = causal(blocks, key.device)
    forced = sinks_and_window(blocks, SINKS, WINDOW, key.device)
    forced[blocks - min(last_blocks, blocks) :] = True
    for alpha in alphas:
        wanted = energy >= alpha * energy.amax(-1, keepdim=True)
        yield Visit((wanted | forced) & allowed, BLOCK, BLOCK, len(key) * mean_key.numel())


def block_energy(logits: torch.Tensor, tile: int) -> torch.Tensor:
    """Sums of exponentials over each tile of rows, relative to the tile's largest logit: [rows, N] to [tiles, N]."""
    padded = torch.nn.functional.pad(logits, (0, 0, 0, -len(logits) % tile), value=-torch.inf).unflatten(0, (-1, tile))
    largest = padded.amax((1, 2), keepdim=True)
    return (padded - largest.masked_fill(largest == -torch.inf, 0)).exp().sum(1)
