"""Sparse attention in torch operations, batched over tiles: what runs on a CPU.

One KV group of one batch entry at a time: `rank` scores the history of a run of segments and lists the keys to visit,
`attend` gathers those keys for a batch of tiles with lists of like length, and attends them together with the dense
span and the block means. Arithmetic is in float32 at least.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch

from . import flash_cpu
from .block_means import block_means
from .config import S2OConfig
from .geometry import BLOCK, Geometry, round_up
from .guides import pool_guides
from .result import AttentionResult

_SCORES = 2**23
"""How many scores are held at once: small enough to stay in the last-level cache."""
_GATHERED = 2**14
"""How many keys are gathered at once, likewise."""


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    geometry: Geometry,
    key_padding: torch.Tensor | None,
    scale: float,
    config: S2OConfig,
) -> AttentionResult:
    """Sparse attention; shapes as in `ops.reference`, `geometry` from the lengths of `query` and `key`."""
    batch, _, length, _ = query.shape
    groups = key.shape[1]
    result = AttentionResult.empty(query, value, config.tile)
    output, lse, visited = result
    if 0 in (batch, length, key.shape[2]):
        return AttentionResult(output.zero_(), lse.fill_(-math.inf), visited.zero_())
    parts = [x.unflatten(1, (groups, -1)) for x in result]
    for b in range(batch):
        for g in range(groups):
            members = query[b].unflatten(0, (groups, -1))[g]
            valid = None if key_padding is None else key_padding[b]
            site = Group(members, key[b, g], value[b, g], valid, geometry, scale, config)
            site.run(*(part[b, g] for part in parts))
    return result


@dataclass
class Lists:
    """The keys to visit of the segments in a run, one list after another.

    `keys` holds all lists end to end; list l of segment s of the run has `count`[l, s] of them, from `start`[l, s].
    `skipped` [lists, segments, blocks] counts the keys of each block that are not listed.
    """

    keys: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    skipped: torch.Tensor


class Group:
    """One KV group of one batch entry: `query` [G, Lq, D], `key` [Lk, D], `value` [Lk, Dv], `valid` [Lk] or None."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        valid: torch.Tensor | None,
        geometry: Geometry,
        scale: float,
        config: S2OConfig,
    ) -> None:
        self.geometry, self.config, self.valid = geometry, config, valid
        dtype = torch.promote_types(query.dtype, torch.float32)
        self.key, self.value = (masked(x.to(dtype), valid).contiguous() for x in (key, value))
        self.query = (query.to(dtype) * scale).contiguous()
        self.finite = bool(self.key.isfinite().all() & self.value.isfinite().all())
        self.heads = len(query)
        self.guides = config.segment // config.pool * (self.heads if config.guides == "head" else 1)
        score_dtype = torch.bfloat16 if dtype == torch.float32 and _has_fast_bfloat16() else dtype
        self.score_key = torch.nn.functional.pad(self.key, (0, 8)).to(score_dtype)
        self.score_key[:, -8:-6] = 1
        self.buffer = torch.empty(max(_SCORES, self.guides * geometry.keys), dtype=score_dtype)
        self.lists = 1 if config.lists == "group" else self.heads
        self.positions = torch.arange(geometry.keys)
        self.seen_bias, self.unseen_bias = self.key.new_tensor([0.0, -math.inf])
        first, sample = config.first_keys, config.sample
        exact, drawn = self.positions[:first], self.positions[sample // 2 :: sample]
        self.drawn = torch.cat([exact, drawn[drawn >= first]])
        self.drawn_key = self.key[self.drawn].to(score_dtype)
        self.drawn_weight = torch.where(self.drawn < first, 0.0, math.log(sample)).to(dtype)
        self.table_key, self.table_value = self.key, self.value
        if config.has_tail:
            self.table_key = torch.cat([self.key, block_means(self.key, valid)])
            self.table_value = torch.cat([self.value, block_means(self.value, valid)])

    def run(self, output: torch.Tensor, lse: torch.Tensor, visited: torch.Tensor) -> None:
        """Attend all tiles and fill `output` [G, Lq, Dv], `lse` [G, Lq] and `visited` [G, tiles]."""
        tile, length = self.config.tile, self.geometry.queries
        padded = torch.nn.functional.pad(self.query, (0, 0, 0, -length % tile))
        queries = padded.unflatten(1, (-1, tile)).unflatten(0, (self.lists, -1)).transpose(1, 2)
        shape = self.lists, self.geometry.tiles, self.heads // self.lists, tile
        outputs, sums = output.new_empty(*shape, output.shape[-1]), lse.new_empty(shape)
        pairs = visited.new_empty(shape[:3])
        for segments in self.runs():
            spans = torch.tensor([self.geometry.span(s) for s in segments])
            lists = self.rank(segments, spans)
            for units in self.batches(segments, spans, lists):
                part, partial_lse, keys = self.attend(queries[units.list, units.tile], units, lists)
                outputs[units.list, units.tile] = part.to(output.dtype)
                sums[units.list, units.tile] = partial_lse.to(lse.dtype)
                pairs[units.list, units.tile] = (keys * units.rows(self.geometry))[:, None]
        output.copy_(outputs.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:, :length])
        lse.copy_(sums.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:, :length])
        visited.copy_(pairs.transpose(1, 2).flatten(0, 1))

    def runs(self) -> Iterator[range]:
        """Consecutive segments whose scores are held at once; those with a history apart from the last, dense ones."""
        first, ranked = 0, self.geometry.ranked_segments
        while first < self.geometry.segments:
            limit = ranked if first < ranked else self.geometry.segments
            end = first + 1
            while end < limit and (end + 1 - first) * self.guides * self.reach(end) <= _SCORES:
                end += 1
            yield range(first, end)
            first = end

    def reach(self, segment: int) -> int:
        """The end of the keys that a segment ranks."""
        return self.geometry.span(segment)[0] if self.geometry.is_causal else self.geometry.keys

    def rank(self, segments: range, spans: torch.Tensor) -> Lists:
        """The keys to visit of each segment of a run, whose dense spans are `spans` [segments, 2]."""
        end = int(spans[:, 0].max()) if self.geometry.is_causal else self.geometry.keys
        blocks = -(-end // BLOCK)
        history = self.positions[:end] < spans[:, :1]
        if not self.geometry.is_causal:
            history |= self.positions[:end] >= spans[:, 1:]
        if self.valid is not None:
            history &= self.valid[:end]
        keep, order = history.expand(self.lists, -1, -1), None
        if self.config.threshold > 0 and end and bool(history.any()):
            importance = self.importance(segments, spans, history)
            if self.config.stop == "gain":
                ranked = importance.clamp_min(-1e30).masked_fill(~keep, -math.inf)
                order = ranked.argsort(dim=-1, descending=True, stable=True)
            else:
                keep = keep & ~(importance < math.log(self.config.threshold))
        count = keep.sum(-1)
        keys = keep.nonzero()[:, -1] if order is None else order[self.positions[:end] < count[..., None]]
        padded = torch.nn.functional.pad(history & ~keep, (0, -end % BLOCK))
        skipped = padded.unflatten(-1, (blocks, BLOCK)).sum(-1)
        return Lists(keys, (count.flatten().cumsum(0) - count.flatten()).view_as(count), count, skipped)

    def importance(self, segments: range, spans: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """The log of the importance of the keys [lists, segments, keys], given the history [segments, keys]."""
        config, size = self.config, self.config.segment
        rows = slice(segments.start * size, min(segments.stop * size, self.geometry.queries))
        guides = pool_guides(self.query[:, rows], config)
        starts = torch.arange(rows.start, rows.stop, config.pool)
        padding = -guides.shape[1] % (size // config.pool)
        # Rows past a ragged end repeat the last guide, which changes no maximum; the mean leaves them out.
        guides = torch.cat([guides, guides[:, -1:].expand(-1, padding, -1)], 1).unflatten(1, (len(segments), -1))
        starts = torch.nn.functional.pad(starts, (0, padding), value=int(starts[-1])).view(len(segments), -1)
        scores = self.score(guides, self.normaliser(guides, starts, spans, history), history.shape[-1])
        largest = scores.amax(2)
        if config.lists == "group":
            largest = largest.amax(0, keepdim=True)
        importance = largest + math.log(config.max_weight) if config.max_weight else torch.full_like(largest, -math.inf)
        if config.mean_weight:
            real = torch.arange(starts.numel()).view_as(starts) < starts.numel() - padding
            mean = scores.masked_fill(~real[..., None], -math.inf).logsumexp(2) - real.sum(1, keepdim=True).log()
            if config.lists == "group":
                mean = mean.logsumexp(0, keepdim=True) - math.log(len(guides))
            importance = torch.maximum(importance, mean + math.log(config.mean_weight))
        importance = importance.masked_fill(importance.isnan(), math.inf)
        importance[..., : config.first_keys] = math.inf
        return importance

    def score(self, guides: torch.Tensor, normaliser: torch.Tensor, keys: int) -> torch.Tensor:
        """Log-probabilities of the first keys [heads, segments, guides, keys], in bfloat16 where that is fast.

        The normaliser enters the product as two more channels, its high and its low part.
        """
        table = self.score_key[:keys]
        high = normaliser.to(table.dtype)
        low = (normaliser - high).to(table.dtype)
        padding = guides.new_zeros(*normaliser.shape, table.shape[-1] - guides.shape[-1] - 2, dtype=table.dtype)
        rows = torch.cat([guides.to(table.dtype), -high[..., None], -low[..., None], padding], -1).flatten(0, 2)
        scores = self.buffer[: len(rows) * keys].view(len(rows), keys)
        torch.mm(rows, table.T, out=scores)
        return scores.unflatten(0, normaliser.shape)

    def normaliser(
        self, guides: torch.Tensor, starts: torch.Tensor, spans: torch.Tensor, history: torch.Tensor
    ) -> torch.Tensor:
        """Each guide's log-sum-exp [heads, segments, guides], estimated from one key in `sample` of the history."""
        span = spans[:, :1] + torch.arange(int((spans[:, 1] - spans[:, 0]).max()))
        seen = (span < spans[:, 1:])[:, None]
        if self.geometry.is_causal:
            seen = seen & (span[:, None] <= starts[..., None] + self.geometry.offset)
        span = span.clamp_max(self.geometry.keys - 1)
        if self.valid is not None:
            seen = seen & self.valid[span][:, None]
        rows = guides.transpose(0, 1)
        near = (rows.flatten(1, 2) @ self.key[span].transpose(1, 2)).view(*rows.shape[:3], -1)
        near += self.bias(seen)[:, None]
        drawn = history[:, self.drawn[self.drawn < history.shape[-1]]]
        table = self.drawn_key[: drawn.shape[-1]]
        far = (rows.flatten(0, 2).to(table.dtype) @ table.T).to(rows.dtype).view(*rows.shape[:3], -1)
        far += (self.drawn_weight[: drawn.shape[-1]] + self.bias(drawn))[:, None, None]
        return torch.logaddexp(log_sum_exp(near), log_sum_exp(far)).transpose(0, 1)

    def batches(self, segments: range, spans: torch.Tensor, lists: Lists) -> Iterator[Units]:
        """The (list, tile) pairs of a run, in batches that attend alike many keys."""
        per_segment = self.config.segment // self.config.tile
        tiles = torch.arange(segments.start * per_segment, min(segments.stop * per_segment, self.geometry.tiles))
        local = tiles // per_segment - segments.start
        low, high = spans[local].unbind(1)
        end = high
        if self.geometry.is_causal:
            rows_end = ((tiles + 1) * self.config.tile).clamp_max(self.geometry.queries)
            end = (rows_end + self.geometry.offset).clamp(0, self.geometry.keys).maximum(low)
        units = Units(
            *(x.flatten() for x in torch.meshgrid(torch.arange(self.lists), tiles, indexing="ij")),
            *(x.repeat(self.lists) for x in (local, low, high, end)),
        )
        keys = lists.count[units.list, units.segment] + units.end - units.low
        order = keys.argsort(descending=True)
        sizes = (keys[order] + lists.skipped.shape[-1]).tolist()
        first = 0
        while first < len(order):
            end_of_batch = first + max(1, _GATHERED // max(1, sizes[first]))
            yield units.select(order[first:end_of_batch])
            first = end_of_batch

    def attend(
        self, query: torch.Tensor, units: Units, lists: Lists
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Attend tiles with queries [U, heads, tile, D].

        Returns:
            Output [U, heads, tile, Dv], log-sum-exp [U, heads, tile] and the keys visited [U], counted in blocks.
        """
        start, count = lists.start[units.list, units.segment], lists.count[units.list, units.segment]
        keys = round_up(units.end - units.low)
        parts = [self.span(units)]
        if self.config.stop == "gain":
            output, lse = self.gather(query, parts)
            return output, lse, keys + self.walk(output, lse, query, lists.keys, start, count)
        parts.append(self.listed(lists.keys, start, count))
        keys = keys + round_up(count)
        if self.config.has_tail:
            parts.append(self.tail(lists.skipped[units.list, units.segment]))
            keys = keys + round_up(self.geometry.history_blocks(units.low, units.high))
        return *self.gather(query, parts), keys

    def gather(self, query: torch.Tensor, parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend the keys of all parts together; return output and log-sum-exp."""
        rows = max(bias.shape[1] for _, bias in parts)
        index = torch.cat([keys for keys, _ in parts], -1)
        bias = torch.cat([bias.expand(-1, rows, -1) for _, bias in parts], -1)
        key, value = (
            table.index_select(0, index.flatten()).unflatten(0, index.shape)
            for table in (self.table_key, self.table_value)
        )
        return flash_cpu.attend(query, key, value, bias, self.finite)

    def walk(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        query: torch.Tensor,
        keys: torch.Tensor,
        start: torch.Tensor,
        count: torch.Tensor,
    ) -> torch.Tensor:
        """Visit lists chunk by chunk until no row of a tile gains enough, and merge them into `output` and `lse`.

        Returns the keys visited [U].
        """
        visited, chunk = torch.zeros_like(count), self.config.chunk
        active, done = count.nonzero()[:, 0], 0
        while len(active):
            size = (count[active] - done).clamp_max(chunk)
            part, gained = self.gather(query[active], [self.listed(keys, start[active] + done, size)])
            before = lse[active]
            lse[active] = after = torch.logaddexp(before, gained)
            share = (gained - after).exp()[..., None]
            output[active] = torch.lerp(output[active], part, share)
            visited[active] += round_up(size)
            done += chunk
            small = (gained - before).exp() < self.config.threshold
            active = active[~small.flatten(1).all(1) & (count[active] > done)]
        return visited

    def span(self, units: Units) -> Part:
        """The dense spans of tiles, under the causal mask."""
        keys = units.low[:, None] + torch.arange(int((units.end - units.low).max()))
        seen = (keys < units.end[:, None])[:, None]
        if self.geometry.is_causal:
            rows = units.tile[:, None] * self.config.tile + torch.arange(self.config.tile)
            seen = seen & (keys[:, None] <= rows[..., None] + self.geometry.offset)
        keys = keys.clamp_max(self.geometry.keys - 1)
        if self.valid is not None:
            seen = seen & self.valid[keys][:, None]
        return keys, self.bias(seen)

    def listed(self, keys: torch.Tensor, start: torch.Tensor, count: torch.Tensor) -> Part:
        """Lists of `count` keys from `start` [U], side by side; what is past the end of a list is masked."""
        place = torch.arange(int(count.max()))
        inside = place < count[:, None]
        index = keys[torch.where(inside, start[:, None] + place, 0)] if len(place) else place.expand(len(count), 0)
        return index, self.bias(inside)[:, None]

    def tail(self, skipped: torch.Tensor) -> Part:
        """The block means, which stand behind the keys in the tables, weighted by the keys skipped [U, blocks]."""
        blocks = self.geometry.keys + torch.arange(skipped.shape[-1])
        return blocks.expand_as(skipped), skipped.to(self.key.dtype).log()[:, None]

    def bias(self, seen: torch.Tensor) -> torch.Tensor:
        """0 where `seen`, -inf elsewhere."""
        return torch.where(seen, self.seen_bias, self.unseen_bias)


Part = tuple[torch.Tensor, torch.Tensor]
"""Keys to gather [U, n], and what is added to their logits [U, rows or 1, n]."""


@dataclass
class Units:
    """Tiles to attend together: which list, which tile, which segment of the run, and their spans of keys.

    A tile attends densely [`low`, `end`), the part of its segment's span [`low`, `high`) that it sees.
    """

    list: torch.Tensor
    tile: torch.Tensor
    segment: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    end: torch.Tensor

    def select(self, order: torch.Tensor) -> Units:
        """The units at `order`."""
        return Units(*(getattr(self, field.name)[order] for field in fields(self)))

    def rows(self, geometry: Geometry) -> torch.Tensor:
        """The query positions of each tile."""
        return (geometry.queries - self.tile * geometry.tile).clamp_max(geometry.tile)


def masked(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """`x` [Lk, D] with the rows of padding set to zero, whatever they hold."""
    return x if valid is None else torch.where(valid[:, None], x, 0)


def log_sum_exp(logits: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the last dimension, by way of the softmax kernel, which is fused."""
    if not logits.shape[-1]:
        return logits.new_full(logits.shape[:-1], -math.inf)
    largest = logits.amax(-1)
    share = logits.softmax(-1).amax(-1)
    return torch.where(largest == -math.inf, largest, largest - share.log())


@functools.cache
def _has_fast_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
