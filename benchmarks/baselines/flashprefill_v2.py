"""FlashPrefill V2 (arXiv 2608.19758, github.com/qhfan/FlashPrefillv2): one choice for the query heads of a KV head.

Scores are those of the first version, over a tile that packs the query heads. What is left out and seen by the whole
tile is not dropped: its blocks' mean keys and mean values stand for them in the softmax, each for as many keys as a
block has. The published tile has 128 rows, a position's heads together; here it has as many whole positions as fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, pool
from .flashprefill import SINKS, WINDOW, block_energy
from .group import Group
from .visit import Visit

THRESHOLD = 0.1
"""Of the largest score, as in the published example; the constructor's default, 1.0, keeps one block."""
LAST_TILES, FIRST_LAYERS = 8, 4
"""Tiles of queries at the end, and layers, that attend densely in the published example: crutches."""


def flashprefill_v2(group: Group, thresholds: Sequence[float], last_tiles: int = 0) -> Iterator[list[Visit]]:
    """Visit the blocks whose score reaches a share of the largest, the first and the latest; means stand for the rest.

    Args:
        group: The query heads of a KV head.
        thresholds: Shares of the largest score; 0 is dense attention.
        last_tiles: Tiles of queries at the end that attend densely.
    """
    heads, length, _ = group.query.shape
    tile = max(1, BLOCK // heads)
    mean_key = pool(group.key)
    blocks = torch.arange(len(mean_key), device=group.key.device)
    positions = torch.arange(length, device=group.key.device)
    first = positions[::tile]
    last = (first + tile - 1).clamp_max(length - 1)
    started = positions[:, None] >= blocks * BLOCK
    ended = ((last + 1) // BLOCK)[:, None] > blocks
    logits = (group.query @ mean_key.T * group.scale).masked_fill(~started, -torch.inf)
    logits = logits.masked_fill(~ended[positions // tile], -torch.inf)
    energy = block_energy(logits.transpose(0, 1).flatten(0, 1), heads * tile)
    allowed = blocks <= (last // BLOCK)[:, None]
    forced = (blocks < SINKS) | (blocks > (first // BLOCK)[:, None] - WINDOW)
    forced[len(first) - min(last_tiles, len(first)) :] = True
    seen_whole = (blocks + 1) * BLOCK <= first[:, None]
    for threshold in thresholds:
        wanted = ended & (energy >= threshold * energy.amax(-1, keepdim=True))
        mask = (wanted | forced) & allowed
        products = length * mean_key.numel() + length * len(mean_key) * group.value.shape[-1]
        yield [Visit(mask, tile, BLOCK, products, means=~mask & seen_whole)] * heads
