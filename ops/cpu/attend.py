"""Attention of a KV head's tiles: first all dense spans, then the listed keys, gathered for many tiles at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from ..config import GAIN_CHUNK
from ..geometry import round_up
from ..result import AttentionResult
from ..rule.block_means import block_means
from ..rule.sampling import most_logits
from . import flash
from .kv_head import KVHead
from .merged import fill_up
from .rank import Lists, span

_GATHERED = 2**14
"""How many keys are gathered at once: few enough to stay in the last-level cache."""


class Attention:
    """The attention of one KV head so far; made with that of the dense spans.

    `output` [tiles, G, tile, Dv], `lse` [tiles, G, tile], and `keys` [tiles, G], the keys visited, counted in blocks.
    """

    def __init__(self, kv_head: KVHead) -> None:
        self.kv_head, self.geometry, self.config = kv_head, kv_head.geometry, kv_head.config
        self.key_value = torch.cat([kv_head.key, kv_head.value], 1)
        if self.config.has_means:
            self.key_value = torch.cat([self.key_value, block_means(self.key_value, kv_head.valid)])
        tile = self.config.ranking.tile
        self.query = fill_up(kv_head.query, tile).unflatten(1, (-1, tile)).transpose(0, 1)
        self.query_by_list = self.by_list(self.query)
        tiles = kv_head.arange(self.geometry.tiles)
        segments = tiles // (self.config.ranking.segment // tile)
        _, low, high = kv_head.spans[segments].unbind(1)
        self.rows = tiles[:, None] * tile + kv_head.arange(tile)
        end = high
        if self.geometry.is_causal:
            last = self.rows[:, -1].clamp_max(self.geometry.queries - 1) + self.geometry.offset
            end = (last + 1).clamp(0, self.geometry.keys).maximum(low)
        self.output, self.lse = self.spans(self.query, self.rows, low, end)
        self.keys = round_up(end - low)[:, None].repeat(1, kv_head.heads)
        self.limit: torch.Tensor | None = None
        if self.config.bounds_weights(kv_head.key.shape[1]):
            self.limit = torch.full_like(self.lse, math.inf)

    def guide_lse(self) -> torch.Tensor:
        """Each guide's log-sum-exp over its dense span [heads, segments, n], or [lists, segments, n] if merged."""
        guides, pool, merged = self.kv_head.guides, self.config.ranking.pool, self.kv_head.merged
        if merged is not None:
            first = self.kv_head.arange(self.geometry.segments)[:, None] * self.config.ranking.segment
            low, high = self.kv_head.spans[:, 1:].repeat_interleave(self.kv_head.lists, 0).unbind(1)
            rows = (first[..., None] + merged.rows).flatten(0, 1)
            lse = self.spans(guides.transpose(0, 1).flatten(0, 1)[:, None], rows, low, high)[1]
            return lse[:, 0].unflatten(0, (-1, self.kv_head.lists)).transpose(0, 1)
        if pool == 1 and self.config.ranking.guides == "head":
            lse = self.lse.transpose(0, 1).flatten(1)[:, : self.geometry.queries]
            return self.kv_head.by_segment(lse[..., None])[..., 0]
        rows = (self.kv_head.arange(guides.shape[1] * guides.shape[2]) * pool).view(guides.shape[1:3])
        return self.spans(guides.transpose(0, 1), rows, *self.kv_head.spans[:, 1:].unbind(1))[1].transpose(0, 1)

    def spans(
        self, query: torch.Tensor, rows: torch.Tensor, low: torch.Tensor, end: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend the keys [low, end) of each unit, for queries [U, H, R, D] at positions `rows` [U, R]."""
        output = query.new_zeros(*query.shape[:3], self.kv_head.value.shape[1])
        lse = query.new_full(query.shape[:3], -math.inf)
        for units, width in batches(end - low):
            keys = low[units, None] + self.kv_head.arange(width)
            inside = keys < end[units, None]
            keys = keys.clamp_max(self.geometry.keys - 1)
            bias = torch.where(inside, query.new_zeros(()), -math.inf)
            bias = self.mask(bias, self.kv_head.arange(query.shape[1]), rows[units], keys)
            output[units], lse[units] = self.gather(query[units], keys, bias)
        return output, lse

    def visit(self, lists: Lists) -> None:
        """Visit the keys of all lists of a run."""
        per_segment = self.config.ranking.segment // self.config.ranking.tile
        first = lists.segments.start * per_segment
        end = min(lists.segments.stop * per_segment, self.geometry.tiles)
        segment = self.kv_head.arange(end - first) // per_segment
        start, count = (x[segment].flatten() for x in (lists.start, lists.count))
        if self.limit is not None and lists.lse is not None:
            self.limit[first:end] = self.bound(lists.lse, lists.segments)[: end - first]
        for units, width in batches(count):
            places = units + first * self.kv_head.lists
            if self.config.ranking.rule == "gain":
                self.walk(places, lists, start[units], count[units])
            else:
                self.add(places, *listed(lists, start[units], count[units], width), round_up(count[units]))
        if self.config.has_means:
            self.visit_means(lists, segment.repeat_interleave(self.kv_head.lists), first * self.kv_head.lists)

    def bound(self, lse: torch.Tensor, segments: range) -> torch.Tensor:
        """The limits of weighed logits [tiles, G, tile], given guides' log-sum-exps [segments, heads or lists, n]."""
        limit, merged = most_logits(lse, self.config.threshold), self.kv_head.merged
        if merged is None:
            rows = limit.repeat_interleave(self.config.ranking.pool, 2).expand(-1, self.kv_head.heads, -1)
        else:
            of_heads = limit.repeat_interleave(self.kv_head.heads // self.kv_head.lists, 1)
            rows = of_heads.gather(2, merged.owner[span(segments)])
        return rows.unflatten(2, (-1, self.config.ranking.tile)).transpose(1, 2).flatten(0, 1)

    def visit_means(self, lists: Lists, segment: torch.Tensor, first: int) -> None:
        """Let block means stand for the keys left out, in the tiles from `first` on, of these segments [U]."""
        left = lists.left_per_block().flatten(0, 1)
        left = left[segment * self.kv_head.lists + self.kv_head.arange(len(segment)) % self.kv_head.lists]
        _, low, high = self.kv_head.spans[lists.segments.start + segment].unbind(1)
        size = round_up(self.geometry.history_blocks(low, high))
        for units, _ in batches(torch.full_like(segment, left.shape[1])):
            blocks = (self.geometry.keys + self.kv_head.arange(left.shape[1])).expand(len(units), -1)
            self.add(units + first, blocks, left[units].to(self.lse.dtype).log(), size[units])

    def walk(self, places: torch.Tensor, lists: Lists, start: torch.Tensor, count: torch.Tensor) -> None:
        """Visit lists chunk by chunk until no row of a tile gains enough."""
        while len(places):
            size = count.clamp_max(GAIN_CHUNK)
            gain = self.add(places, *listed(lists, start, size, GAIN_CHUNK), round_up(size))
            real = self.rows[places // self.kv_head.lists, None] < self.geometry.queries
            goes_on = (real & ~(gain < self.config.threshold)).flatten(1).any(1) & (count > size)
            places, start, count = places[goes_on], (start + size)[goes_on], (count - size)[goes_on]

    def add(self, places: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Attend `keys` [U, n] with `bias` [U, n] at (tile, list) pairs `places`; return each row's gain in mass."""
        output, lse, visited = (self.by_list(x) for x in (self.output, self.lse, self.keys))
        limit = None if self.limit is None else self.by_list(self.limit)[places]
        bias = self.mask_listed(bias, places, keys) if self.kv_head.visibility.rows_differ else bias[:, None, None]
        part, gained = self.gather(self.query_by_list[places], keys, bias, limit)
        before = lse[places]
        lse[places] = after = torch.logaddexp(before, gained)
        share = (gained - after.masked_fill(after == -math.inf, 0)).exp()
        output[places] = torch.lerp(output[places], part, share[..., None])
        visited[places] += size[:, None]
        return (gained - before).exp()

    def by_list(self, x: torch.Tensor) -> torch.Tensor:
        """Values of tiles and heads [tiles, G, ...], by (tile, list) pair [tiles * lists, G / lists, ...]."""
        return x.unflatten(1, (self.kv_head.lists, -1)).flatten(0, 1)

    def mask_listed(self, bias: torch.Tensor, places: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`mask`, at (tile, list) pairs `places`."""
        heads = self.kv_head.heads // self.kv_head.lists
        head = places[:, None] % self.kv_head.lists * heads + self.kv_head.arange(heads)
        return self.mask(bias, head, self.rows[places // self.kv_head.lists], keys)

    def mask(self, bias: torch.Tensor, head: torch.Tensor, row: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The `bias` [U, n] of `keys` [U, n] for heads [H] or [U, H] and rows [U, R]: [U, H or 1, R or 1, n]."""
        seen = self.kv_head.seen(head[..., None, None], row[:, None, :, None], keys[:, None, None])
        return torch.where(seen, bias[:, None, None], -math.inf)

    def gather(
        self, query: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, limit: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend `keys` [U, n] with `bias` and `limit` as in `flash.attend`, for queries [U, H, R, D]."""
        gathered = self.key_value.index_select(0, keys.flatten()).unflatten(0, keys.shape)
        key, value = gathered.split([query.shape[-1], gathered.shape[-1] - query.shape[-1]], -1)
        return flash.attend(query, key, value, bias, self.kv_head.softcap, self.kv_head.finite, limit)

    def write(self, result: AttentionResult) -> None:
        """Fill the KV head's part of the result: [G, Lq, Dv], [G, Lq] and [G, tiles]."""
        length, tile = self.geometry.queries, self.config.ranking.tile
        result.output.copy_(self.output.transpose(0, 1).flatten(1, 2)[:, :length])
        result.lse.copy_(self.lse.transpose(0, 1).flatten(1)[:, :length])
        rows = (length - self.kv_head.arange(self.geometry.tiles) * tile).clamp_max(tile)
        result.visited.copy_(self.keys.T * rows)


def listed(lists: Lists, start: torch.Tensor, count: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` keys from `start` [U] on, and their log-weights, side by side [U, width]; all end in -inf."""
    place = torch.arange(width, device=count.device)
    index = torch.where(place < count[:, None], start[:, None] + place, len(lists.keys) - 1)
    return lists.keys.take(index), lists.log_weight.take(index)


def batches(sizes: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Units with keys to attend, in batches, and how many keys each unit of a batch gets, a multiple of 64.

    That depends on a unit's own size alone: what is added to it changes the rounding of its result, which should not
    depend on the other units of a call.
    """
    widths = round_up(sizes)
    order = widths.argsort(descending=True)[: int((sizes > 0).sum())]
    first = 0
    for width, count in zip(*widths[order].unique_consecutive(return_counts=True), strict=True):
        for units in order[first : first + int(count)].split(max(1, _GATHERED // int(width))):
            yield units, int(width)
        first += int(count)
