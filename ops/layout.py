"""Which positions of a sequence each rank holds where a sequence is sharded over ranks.

A sequence of n ranks is cut into 2n blocks. "head-tail" gives rank r the blocks r and 2n - 1 - r, as torch's
``context_parallel`` does by default, so that causal attention is as much work on all ranks; "contiguous" gives it the
blocks 2r and 2r + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

LAYOUTS = ("head-tail", "contiguous")


class Sharding(NamedTuple):
    """The ranks over which a sequence is sharded, by the name of their process group, and its layout."""

    group: str
    layout: str


class Block(NamedTuple):
    """So many consecutive queries of a rank, from `row` on, which stand in the sequence from `position` on."""

    row: int
    position: int
    length: int

    def pooled(self, pool: int) -> Block:
        """The same where each `pool` queries are one; whole ones, if the block is."""
        first = self.position // pool
        return Block(self.row // pool, first, (self.position + self.length) // pool - first)


def blocks_of_rank(rank: int, ranks: int, length: int, layout: str, segment: int) -> list[Block]:
    """The positions of the `length` queries of a rank, in order.

    Blocks that are neighbours are one, unless that would tear a segment of so many queries apart elsewhere.
    """
    if layout == "contiguous":
        return [Block(0, rank * length, length)]
    half = length // 2
    head, tail = Block(0, rank * half, half), Block(half, (2 * ranks - 1 - rank) * half, half)
    if tail.position == head.position + half and (half % segment == 0 or ranks == 1):
        return [Block(0, head.position, length)]
    return [head, tail]


def are_in_order(ranks: int, layout: str) -> bool:
    """Whether what the ranks hold is by position, one rank after the other."""
    return layout == "contiguous" or ranks == 1


def in_order(gathered: torch.Tensor, ranks: int, layout: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """What the ranks hold [ranks * length, ...], gathered one rank after the other, by position in the sequence.

    `out` is filled where they are not in order.
    """
    if are_in_order(ranks, layout) or not len(gathered):
        return gathered
    blocks = gathered.unflatten(0, (2 * ranks, -1)).unbind()
    return torch.cat([*blocks[::2], *blocks[::-2]], out=out)
