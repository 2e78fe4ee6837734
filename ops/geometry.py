"""The keys that a segment of queries attends densely, and those that it ranks.

A segment of queries [first_row, end_row) attends the keys of its *dense span* [low, high) one by one, masked. The
keys outside it that some of its rows may see are its *history*: [start, low), and without a causal mask also
[high, Lk). `start` is 0, or with a window the first block that the window reaches from the first row. `start`
and `low` are multiples of `BLOCK`, and so is `high` without a causal mask unless it is Lk, so that the history is whole
blocks but for its end. The causal mask
hides none of the history from any row; the window, documents and masks may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

from .config import S2OConfig
from .visibility import Visibility

BLOCK = 64

Count = TypeVar("Count", int, torch.Tensor)


class Span(NamedTuple):
    """Where a segment's history starts, and its dense span [low, high)."""

    start: int
    low: int
    high: int


@dataclass(frozen=True)
class Geometry:
    """The lengths of a call, its causal mask and window, and the parts of the configuration that place spans.

    `is_causal` lets query i see the keys up to i + `offset`, `window` those after i + `offset` - `window`. Lengths may
    be symbolic.
    """

    queries: int
    keys: int
    is_causal: bool
    offset: int
    window: int | None
    segment: int
    tile: int
    near_keys: int
    last_queries: int

    @classmethod
    def of(cls, query: torch.Tensor, key: torch.Tensor, visibility: Visibility, config: S2OConfig) -> Geometry:
        """The geometry of attention between `query` [B, Hq, Lq, D] and `key` [B, Hkv, Lk, D]."""
        return cls(
            queries=query.shape[2],
            keys=key.shape[2],
            is_causal=visibility.is_causal,
            offset=visibility.causal_offset,
            window=visibility.window,
            segment=config.ranking.segment,
            tile=config.ranking.tile,
            # More would make no difference, and may overflow.
            near_keys=min(config.ranking.near_keys, query.shape[2] + key.shape[2] + abs(visibility.causal_offset)),
            last_queries=config.last_queries,
        )

    @property
    def segments(self) -> int:
        """How many segments the queries are cut into."""
        return -(-self.queries // self.segment)

    @property
    def first_number(self) -> int:
        """The number of the first segment from position 0 on, by which it draws: chunks of a prompt draw as it does."""
        return max(0, self.offset) // self.segment

    @property
    def tiles(self) -> int:
        """How many tiles the queries are cut into."""
        return -(-self.queries // self.tile)

    @property
    def ranked_segments(self) -> int:
        """How many segments come before those that hold the last, densely attended queries."""
        return max(0, self.queries - self.last_queries) // self.segment if self.last_queries else self.segments

    def span(self, segment: int) -> Span:
        """The history's start and the dense span of a segment."""
        return Span(*self._span(segment))

    def spans(self, segments: range, device: torch.device) -> torch.Tensor:
        """`span` of consecutive segments [segments, 3] int64, computed on `device` without a synchronisation."""
        return torch.stack(self._span(torch.arange(segments.start, segments.stop, device=device)), 1)

    def _span(self, segment: Count) -> tuple[Count, Count, Count]:
        first = segment * self.segment
        end = _clip(first + self.segment, 0, self.queries)
        start = first * 0
        if self.window is not None:
            start = self._clip(first + self.offset - self.window + 1) // BLOCK * BLOCK
        low = _clip(first + self.offset - self.near_keys, start, self.keys) // BLOCK * BLOCK
        high = self._clip(round_up(self._clip(end + self.offset + self.near_keys)))
        is_ranked = segment < self.ranked_segments
        low, high = _where(is_ranked, low, start), _where(is_ranked, high, self.keys)
        if self.is_causal:
            high = self._clip(end + self.offset)
        return start, low, _clip(high, low, self.keys)

    def longest_history(self, segment: int) -> int:
        """At least as many keys as the history of any segment up to `segment` has, and at least 1."""
        if not self.is_causal:
            return self.keys
        longest = max(1, self.span(min(segment, self.ranked_segments - 1)).low)
        return longest if self.window is None else min(longest, self.window + BLOCK)

    def history(self, positions: torch.Tensor, spans: torch.Tensor) -> torch.Tensor:
        """Membership of key positions [N] in the histories of segments with these spans [S, 3]: [S, N] boolean."""
        start, low, high = spans[:, :, None].unbind(1)
        history = positions < low
        if self.window is not None:
            history = history & (positions >= start)
        return history if self.is_causal else history | (positions >= high)

    def tile_end(self, tile: int, high: int) -> int:
        """The end of the keys that some row of a tile sees, given the end of its segment's dense span."""
        if not self.is_causal:
            return high
        return self._clip(min((tile + 1) * self.tile, self.queries) + self.offset)

    def history_blocks(self, low: Count, high: Count) -> Count:
        """How many blocks of keys the history of a segment with dense span [low, high) has, without a window."""
        before = low // BLOCK
        return before if self.is_causal else before + -(-(self.keys - high) // BLOCK)

    def _clip(self, key: Count) -> Count:
        return _clip(key, 0, self.keys)


def round_up(count: Count, multiple: int = BLOCK) -> Count:
    """The least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple


def _clip(value: Any, least: Any, most: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clamp_min(least).clamp_max(most)
    return max(least, min(value, most))


def _where(condition: Any, one: Any, other: Any) -> Any:
    if isinstance(condition, torch.Tensor):
        return torch.where(condition, one, other)
    return one if condition else other
