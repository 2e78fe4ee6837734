"""What a rule could reach that knew the true attention: the keys, or the blocks, with most of a tile's mass.

It bounds rules that leave the rest out. What stands for the rest, such as a sample of it, can do better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, last_attention, pool
from .visit import Visit


def oracle(
    query: torch.Tensor, key: torch.Tensor, scale: float, thresholds: Sequence[float], tile: int = 32, block: int = 1
) -> Iterator[Visit]:
    """Visit blocks in which the mean probability of a pair reaches a threshold, and the tile's own keys.

    One threshold for all tiles leaves the least mass out that any choice of as many pairs can. Its ranking is free.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        thresholds: Least mean probabilities.
        tile: Queries that share a choice; divides 128.
        block: Keys that are chosen together.
    """
    mass = tile_mass(query, key, scale, tile, block)
    starts, firsts = (torch.arange(count, device=key.device) for count in mass.shape)
    starts, firsts = starts[:, None] * tile, firsts * block
    own = (firsts < starts + tile) & (firsts + block > starts)
    for threshold in thresholds:
        yield Visit((mass >= threshold) | own, tile, block, ranking=0)


def tile_mass(query: torch.Tensor, key: torch.Tensor, scale: float, tile: int, block: int) -> torch.Tensor:
    """The mean probability of the pairs of each tile and block [tiles, blocks]."""
    mass = key.new_zeros(-(-len(key) // tile), -(-len(key) // block))
    strip = max(tile, BLOCK)
    for start in range(0, len(key), strip):
        end = min(start + strip, len(key))
        by_tile = pool(last_attention(query[:end], key[:end], scale, end - start), tile)
        by_block = pool(by_tile.T, block).T
        mass[start // tile :][: len(by_block), : by_block.shape[1]] = by_block
    return mass
