"""Which keys a segment of queries attends densely, and which it ranks.

A segment of queries [first_row, end_row) attends the keys of its *dense span* [low, high) one by one, under the
causal mask. The keys outside it that all of its rows may see are its *history*: [0, low), and without a causal mask
also [high, Lk). Both ends of the span are multiples of `BLOCK`, so that the history is whole blocks, unless they
end at the last key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from .config import S2OConfig

BLOCK = 64

Count = TypeVar("Count", int, torch.Tensor)


@dataclass(frozen=True)
class Geometry:
    """The lengths of a call, its causal mask, and the parts of the configuration that place spans.

    `is_causal` lets query i see the keys up to i + `offset`. Lengths may be symbolic.
    """

    queries: int
    keys: int
    is_causal: bool
    offset: int
    segment: int
    tile: int
    near_keys: int
    last_queries: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, is_causal: bool, offset: int, config: S2OConfig) -> Geometry:
        """The geometry of attention between `query` [B, Hq, Lq, D] and `key` [B, Hkv, Lk, D]."""
        lengths = query.shape[2], key.shape[2]
        return cls(*lengths, is_causal, offset, config.segment, config.tile, config.near_keys, config.last_queries)

    @property
    def segments(self) -> int:
        """How many segments the queries are cut into."""
        return -(-self.queries // self.segment)

    @property
    def tiles(self) -> int:
        """How many tiles the queries are cut into."""
        return -(-self.queries // self.tile)

    @property
    def ranked_segments(self) -> int:
        """How many segments come before those that hold the last, densely attended queries."""
        return max(0, self.queries - self.last_queries) // self.segment if self.last_queries else self.segments

    def span(self, segment: int) -> tuple[int, int]:
        """The dense span [low, high) of a segment."""
        first = segment * self.segment
        end = min(first + self.segment, self.queries)
        if segment >= self.ranked_segments:
            low, high = 0, self.keys
        else:
            low = self._clip(first + self.offset - self.near_keys) // BLOCK * BLOCK
            high = self._clip(-(-self._clip(end + self.offset + self.near_keys) // BLOCK) * BLOCK)
        if self.is_causal:
            high = self._clip(end + self.offset)
        return low, max(low, high)

    def tile_end(self, tile: int, high: int) -> int:
        """The end of the keys that some row of a tile sees, given the end of its segment's dense span."""
        if not self.is_causal:
            return high
        return self._clip(min((tile + 1) * self.tile, self.queries) + self.offset)

    def history_blocks(self, low: Count, high: Count) -> Count:
        """How many blocks of keys the history of a segment with dense span [low, high) has."""
        before = low // BLOCK
        return before if self.is_causal else before + -(-(self.keys - high) // BLOCK)

    def _clip(self, key: int) -> int:
        return max(0, min(key, self.keys))


def round_up(count: Count, multiple: int = BLOCK) -> Count:
    """The least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
