"""Attention of a group's tiles: first all dense spans, then the listed keys, gathered for many tiles at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from ..block_means import block_means
from ..geometry import round_up
from ..result import AttentionResult
from ..sampling import most_logits
from . import flash
from .group import Group
from .rank import Lists

_GATHERED = 2**14
"""How many keys are gathered at once: few enough to stay in the last-level cache."""


class Attention:
    """The attention of one group so far; made with that of the dense spans.

    `output` [tiles, G, tile, Dv], `lse` [tiles, G, tile], and `keys` [tiles, G], the keys visited, counted in blocks.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.geometry, self.config = group, group.geometry, group.config
        self.key, self.value = group.key, group.value
        if self.config.has_means:
            self.key, self.value = (torch.cat([x, block_means(x, group.valid)]) for x in (group.key, group.value))
        tile = self.config.tile
        padded = pad(group.query, (0, 0, 0, -self.geometry.queries % tile))
        self.query = padded.unflatten(1, (-1, tile)).transpose(0, 1).contiguous()
        tiles = group.arange(self.geometry.tiles)
        segments = tiles // (self.config.segment // tile)
        _, low, high = group.spans[segments].unbind(1)
        self.rows = tiles[:, None] * tile + group.arange(tile)
        end = high
        if self.geometry.is_causal:
            last = self.rows[:, -1].clamp_max(self.geometry.queries - 1) + self.geometry.offset
            end = (last + 1).clamp(0, self.geometry.keys).maximum(low)
        self.output, self.lse = self.spans(self.query, self.rows, low, end)
        self.keys = round_up(end - low)[:, None].repeat(1, group.heads)
        self.most: torch.Tensor | None = None
        if self.config.bounds_weights(group.key.shape[1]):
            self.most = torch.full_like(self.lse, math.inf)

    def guide_lse(self) -> torch.Tensor:
        """Each guide's log-sum-exp over its dense span [heads, segments, n]."""
        guides, pool = self.group.guides, self.config.pool
        if pool == 1 and self.config.guides == "head":
            lse = self.lse.transpose(0, 1).flatten(1)[:, : self.geometry.queries]
            return self.group.by_segment(lse[..., None])[..., 0]
        rows = (self.group.arange(guides.shape[1] * guides.shape[2]) * pool).view(guides.shape[1:3])
        return self.spans(guides.transpose(0, 1), rows, *self.group.spans[:, 1:].unbind(1))[1].transpose(0, 1)

    def spans(
        self, query: torch.Tensor, rows: torch.Tensor, low: torch.Tensor, end: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend the keys [low, end) of each unit, for queries [U, H, R, D] at positions `rows` [U, R]."""
        output = query.new_zeros(*query.shape[:3], self.value.shape[-1])
        lse = query.new_full(query.shape[:3], -math.inf)
        for units in batches(end - low):
            keys = low[units, None] + self.group.arange(int((end - low)[units].max()))
            inside = keys < end[units, None]
            keys = keys.clamp_max(self.geometry.keys - 1)
            bias = torch.where(inside, self.key.new_zeros(()), -math.inf)
            bias = self.mask(bias, self.group.arange(query.shape[1]), rows[units], keys)
            output[units], lse[units] = self.gather(query[units], keys, bias)
        return output, lse

    def visit(self, lists: Lists) -> None:
        """Visit the keys of all lists of a run."""
        per_segment = self.config.segment // self.config.tile
        first = lists.segments.start * per_segment
        end = min(lists.segments.stop * per_segment, self.geometry.tiles)
        segment = self.group.arange(end - first) // per_segment
        start, count = (x[segment].flatten() for x in (lists.start, lists.count))
        if self.most is not None and lists.lse is not None:
            self.most[first:end] = self.bound(lists.lse)[: end - first]
        for units in batches(count):
            places = units + first * self.group.lists
            if self.config.stop == "gain":
                self.walk(places, lists, start[units], count[units])
            else:
                self.add(places, *listed(lists, start[units], count[units]), round_up(count[units]))
        if self.config.has_means:
            self.visit_means(lists, segment.repeat_interleave(self.group.lists), first * self.group.lists)

    def bound(self, lse: torch.Tensor) -> torch.Tensor:
        """What weights may raise logits to [tiles, G, tile], given their guides' log-sum-exps [segments, heads, n]."""
        most = most_logits(lse, self.config.threshold)
        rows = most.repeat_interleave(self.config.pool, 2).expand(-1, self.group.heads, -1)
        return rows.unflatten(2, (-1, self.config.tile)).transpose(1, 2).flatten(0, 1)

    def visit_means(self, lists: Lists, segment: torch.Tensor, first: int) -> None:
        """Let block means stand for the keys left out, in the tiles from `first` on, of these segments [U]."""
        left = lists.left_per_block().flatten(0, 1)
        left = left[segment * self.group.lists + self.group.arange(len(segment)) % self.group.lists]
        _, low, high = self.group.spans[lists.segments.start + segment].unbind(1)
        size = round_up(self.geometry.history_blocks(low, high))
        for units in batches(torch.full_like(segment, left.shape[1])):
            blocks = (self.geometry.keys + self.group.arange(left.shape[1])).expand(len(units), -1)
            self.add(units + first, blocks, left[units].to(self.key.dtype).log(), size[units])

    def walk(self, places: torch.Tensor, lists: Lists, start: torch.Tensor, count: torch.Tensor) -> None:
        """Visit lists chunk by chunk until no row of a tile gains enough."""
        while len(places):
            size = count.clamp_max(self.config.chunk)
            gain = self.add(places, *listed(lists, start, size), round_up(size))
            real = self.rows[places // self.group.lists, None] < self.geometry.queries
            goes_on = (real & ~(gain < self.config.threshold)).flatten(1).any(1) & (count > size)
            places, start, count = places[goes_on], (start + size)[goes_on], (count - size)[goes_on]

    def add(self, places: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        """Attend `keys` [U, n] with `bias` [U, n] at (tile, list) pairs `places`; return each row's gain in mass."""
        query, output, lse, visited = (self.by_list(x) for x in (self.query, self.output, self.lse, self.keys))
        most = None if self.most is None else self.by_list(self.most)[places]
        bias = self.mask_listed(bias, places, keys) if self.group.visibility.varies else bias[:, None, None]
        part, gained = self.gather(query[places], keys, bias, most)
        before = lse[places]
        lse[places] = after = torch.logaddexp(before, gained)
        share = (gained - after.masked_fill(after == -math.inf, 0)).exp()
        output[places] = torch.lerp(output[places], part, share[..., None])
        visited[places] += size[:, None]
        return (gained - before).exp()

    def by_list(self, x: torch.Tensor) -> torch.Tensor:
        """What holds for tiles and heads [tiles, G, ...], by (tile, list) pair [tiles * lists, G / lists, ...]."""
        return x.unflatten(1, (self.group.lists, -1)).flatten(0, 1)

    def mask_listed(self, bias: torch.Tensor, places: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """`mask`, at (tile, list) pairs `places`."""
        heads = self.group.heads // self.group.lists
        head = places[:, None] % self.group.lists * heads + self.group.arange(heads)
        return self.mask(bias, head, self.rows[places // self.group.lists], keys)

    def mask(self, bias: torch.Tensor, head: torch.Tensor, row: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The `bias` [U, n] of `keys` [U, n] for heads [H] or [U, H] and rows [U, R]: [U, H or 1, R or 1, n]."""
        seen = self.group.seen(head[..., None, None], row[:, None, :, None], keys[:, None, None])
        return torch.where(seen, bias[:, None, None], -math.inf)

    def gather(
        self, query: torch.Tensor, keys: torch.Tensor, bias: torch.Tensor, most: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend `keys` [U, n] with `bias` and `most` as in `flash.attend`, for queries [U, H, R, D]."""
        key, value = (x.index_select(0, keys.flatten()).unflatten(0, keys.shape) for x in (self.key, self.value))
        return flash.attend(query, key, value, bias, self.group.softcap, self.group.finite, most)

    def write(self, result: AttentionResult) -> None:
        """Fill the group's part of the result: [G, Lq, Dv], [G, Lq] and [G, tiles]."""
        length, tile = self.geometry.queries, self.config.tile
        result.output.copy_(self.output.transpose(0, 1).flatten(1, 2)[:, :length])
        result.lse.copy_(self.lse.transpose(0, 1).flatten(1)[:, :length])
        rows = (length - self.group.arange(self.geometry.tiles) * tile).clamp_max(tile)
        result.visited.copy_(self.keys.T * rows)


def listed(lists: Lists, start: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` keys from `start` [U] on, and their log-weights, side by side [U, n]; the shorter end in -inf."""
    place = torch.arange(int(count.max()), device=count.device)
    index = torch.where(place < count[:, None], start[:, None] + place, len(lists.keys) - 1)
    return lists.keys[index], lists.log_weight[index]


def batches(sizes: torch.Tensor) -> Iterator[torch.Tensor]:
    """Units with keys to attend, in batches of like size."""
    order = sizes.argsort(descending=True)[: int((sizes > 0).sum())]
    sorted_sizes, first = sizes[order].tolist(), 0
    while first < len(order):
        end = first + max(1, _GATHERED // sorted_sizes[first])
        yield order[first:end]
        first = end
