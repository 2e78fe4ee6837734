"""What a query head visits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from s2o_compile.ops.density import dense_pairs
from s2o_compile.ops.geometry import round_up


@dataclass(frozen=True)
class Visit:
    """The blocks of keys that each tile of queries of one head visits.

    Attributes:
        mask: [tiles, blocks] boolean.
        tile: Queries of a tile.
        block: Keys of a block; 1 for rules that choose key by key.
        ranking: FLOPs of the products that scored keys.
        order: [L], the key positions in the order in which blocks hold them; None for their own order.
        means: [tiles, blocks] boolean, whole blocks in their own order for which their mean key and mean value stand,
            each for all keys of the block; None for none.
    """

    mask: torch.Tensor
    tile: int
    block: int
    ranking: float
    order: torch.Tensor | None = None
    means: torch.Tensor | None = None

    def seen(self, tile: int | slice, length: int) -> torch.Tensor:
        """Which of `length` positions a tile visits: [length] boolean; for a slice of tiles [tiles, length]."""
        places = self.mask[tile].repeat_interleave(self.block, dim=-1)[..., :length]
        if self.order is None:
            return places
        return torch.empty_like(places).scatter_(-1, self.order.expand_as(places), places)

    def keys(self, tile: int, length: int) -> torch.Tensor:
        """The positions, of `length`, that a tile visits."""
        return self.seen(tile, length).nonzero()[:, 0]

    def density(self, length: int) -> float:
        """Visited pairs over those of a dense kernel, for `length` positions; keys are counted in blocks of 64."""
        starts = torch.arange(len(self.mask), device=self.mask.device) * self.tile
        keys = round_up((self.mask.sum(-1) * self.block).clamp_max(length))
        pairs = (keys * (length - starts).clamp_max(self.tile)).sum()
        return float(pairs) / dense_pairs(length, length, True, 0, self.tile)
