"""The specification: sparse attention by online permutation and early stopping, one segment at a time.

Every other implementation is tested against this one. It follows S2O (arXiv 2602.22575), generalised:

1. The queries are cut into segments; the queries of a segment are pooled into guides (`pool_guides`).
2. Each key of the segment's history gets an importance: the share of softmax mass that the guides that see it give
   it (`importance`; a guide sees what its first query sees). Keys are ranked by it, one list per query head or per
   KV group.
   Scores may be of fewer channels (`ops.projection`), and shares of mass may be weighed by what leaving the key out
   does to the output (`ops.contribution`).
3. Pass 1 attends the segment's dense span, and so initialises the online softmax. In both passes each row is masked.
4. Pass 2 walks the list in order of importance and stops early, by one of two rules:
   "importance" stops where the importance falls below the threshold; "gain" stops after the first chunk of keys
   in which no row of the tile gained a share `threshold` of its softmax mass.
5. Keys below the threshold are the tail. Of a sampled tail, some are listed all the same, and weigh more
   (`ops.sampling`); or the keys of each block that were not listed enter as one key, the block's mean.

It is slow and meant to be read. Give it float32 or float64.
"""

from __future__ import annotations

import math

import torch

from .config import S2OConfig
from .geometry import BLOCK, Geometry, round_up
from .result import AttentionResult
from .rule.channels import Projected, project_kv_head
from .rule.guides import pool_guides
from .rule.output_weighting import sampled_rows, value_distances
from .rule.sampling import draws, most_logits
from .rule.softmax import OnlineSoftmax, soft_cap
from .visibility import Visibility, masked


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    config: S2OConfig | None = None,
) -> AttentionResult:
    """Sparse attention as specified, in plain PyTorch.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Lk, Dv].
        visibility: Which keys each query sees, by default all.
        scale: Factor of the logits, by default D ** -0.5.
        softcap: Bound of the logits, see `soft_cap`; 0 for none.
        sinks: [Hq], one more logit per head in the softmax, without a value; None for none.
        config: The rule, as far as `visibility` lets a call follow it; `min_length` does not matter here.
    """
    visibility = visibility or Visibility()
    config = visibility.ranking(config or S2OConfig())
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    geometry = Geometry.of(query, key, visibility, config)
    batch, heads, length, _ = query.shape
    groups, group = key.shape[1], heads // max(1, key.shape[1])
    output = query.new_zeros(batch, heads, length, value.shape[-1])
    lse = query.new_full((batch, heads, length), -math.inf)
    visited = torch.zeros(batch, heads, geometry.tiles, dtype=torch.int64, device=query.device)
    head, row, column = (torch.arange(size, device=query.device) for size in (heads, length, geometry.keys))
    for b in range(batch):
        seen = visibility.seen(b, head[:, None, None], row[:, None], column).expand(heads, length, geometry.keys)
        for g in range(groups):
            members = slice(g * group, (g + 1) * group)
            valid = None if visibility.key_padding is None else visibility.key_padding[b]
            guides = pool_guides(query[b, members], config)
            scored = project_kv_head(guides, key[b, g], config.channels, scale, valid)
            distances = None
            if config.measure == "output":
                rows = sampled_rows(length, group, query.device)
                held = masked(value[b, g], valid)
                distances = value_distances(
                    query[b, members][:, rows], key[b, g], held, seen[members][:, rows], scale, softcap
                )
            for segment in range(geometry.segments):
                site = Segment(
                    query[b, members], key[b, g], value[b, g], scored, distances, seen[members], segment, geometry,
                    config, scale, softcap,
                )  # fmt: skip
                for tile in site.tiles():
                    part = slice(tile * config.tile, min((tile + 1) * config.tile, length))
                    softmax, counts = site.attend(part, tile)
                    if sinks is not None:
                        sink = sinks[members, None, None].to(query.dtype).expand(-1, part.stop - part.start, 1)
                        softmax.add(sink, value.new_zeros(group, 1, value.shape[-1]))
                    output[b, members, part] = softmax.output()
                    lse[b, members, part] = softmax.lse()
                    visited[b, members, tile] = counts
    return AttentionResult(output, lse, visited)


class Segment:
    """One segment of one KV group: its ranking, and the attention of its tiles.

    `query` is [G, Lq, D], of the G heads of the group; `key` [Lk, D]; `value` [Lk, Dv]; `seen` [G, Lq, Lk];
    `scored` [G or 1, n, channels] and [Lk, channels] is what keys are scored by; `distances` [Lk] weigh shares of mass,
    None for none.
    """

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scored: Projected,
        distances: torch.Tensor | None,
        seen: torch.Tensor,
        index: int,
        geometry: Geometry,
        config: S2OConfig,
        scale: float,
        softcap: float,
    ) -> None:
        self.query, self.key, self.value, self.seen = query, key, value, seen
        self.geometry, self.config, self.scale, self.softcap = geometry, config, scale, softcap
        self.index = index
        per_segment = config.segment // config.pool
        part = slice(index * per_segment, (index + 1) * per_segment)
        self.scored, self.distances = scored._replace(guides=scored.guides[:, part]), distances
        self.rows = range(index * config.segment, min((index + 1) * config.segment, geometry.queries))
        span = geometry.span(index)
        _, self.low, self.high = span
        self.positions = torch.arange(geometry.keys, device=key.device)
        self.history = geometry.history(self.positions, torch.tensor([span], device=key.device))[0]
        guides = pool_guides(self.query[:, self.rows.start : self.rows.stop], config)
        self.seen_by_guides = self.seen[: len(guides), self.rows.start : self.rows.stop : config.pool]
        self.guide_lse = self.normaliser(self.logits(guides, key).masked_fill(~self.seen_by_guides, -math.inf))
        self.lists, self.log_weights = self.ranking()

    def logits(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The logits of queries [..., R, D] and keys [N, D]: [..., R, N]."""
        return soft_cap(query @ key.T * self.scale, self.softcap)

    def tiles(self) -> range:
        """The tiles of this segment."""
        return range(self.rows.start // self.config.tile, -(-self.rows.stop // self.config.tile))

    def ranking(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The keys to visit in order, and the logs of what they weigh, by query head; a group may share one list."""
        heads, seen = len(self.query), self.seen_by_guides
        importance = self.importance()
        listed = self.history & seen.unflatten(0, (len(importance), -1)).flatten(1, 2).any(1)
        log_weight = torch.zeros_like(importance)
        if self.config.has_samples:
            probability = (importance / self.config.threshold).clamp_max(1)
            segment = torch.tensor(self.index, device=self.key.device)
            listed = listed & (probability >= draws(self.positions, segment))
            log_weight = -probability.log()
        elif self.config.stop == "importance":
            listed = listed & (importance >= self.config.threshold)
        lists = [
            row.argsort(descending=True, stable=True)[: int(keep.sum())]
            for row, keep in zip(importance.masked_fill(~listed, -1), listed, strict=True)
        ]
        weights = [row[ranked] for row, ranked in zip(log_weight, lists, strict=True)]
        copies = heads // len(lists)
        return lists * copies, weights * copies

    def importance(self) -> torch.Tensor:
        """The importance of every key [lists, Lk].

        NaN becomes inf: where a guide tells nothing, every key it sees is visited.
        """
        config = self.config
        logits = self.logits(self.scored.guides, self.scored.key)
        if self.scored.neglected is not None:
            logits = logits + self.scored.neglected
        probability = (logits - self.guide_lse[..., None]).exp().masked_fill(~self.seen_by_guides, 0)
        if config.lists == "group":
            probability = probability.flatten(0, 1)[None]
        largest, mean = probability.amax(1) * config.max_weight, probability.mean(1) * config.mean_weight
        importance = torch.maximum(largest, mean)
        if self.distances is not None:
            importance = importance * self.distances
        importance = importance.masked_fill(importance.isnan(), math.inf)
        importance[:, : config.first_keys] = math.inf
        return importance

    def normaliser(self, logits: torch.Tensor) -> torch.Tensor:
        """Each guide's log-sum-exp [heads, n], from its dense span, the first keys and one in `sample` of the rest."""
        first, sample = self.config.first_keys, self.config.sample
        dense = (self.positions >= self.low) & (self.positions < self.high)
        drawn = self.history & (self.positions >= first) & (self.positions % sample == sample // 2)
        exact = dense | (self.history & (self.positions < first))
        weight = exact.to(logits.dtype) + sample * drawn
        return (logits + weight.log()).masked_fill(weight == 0, -math.inf).logsumexp(-1)

    def attend(self, rows: slice, tile: int) -> tuple[OnlineSoftmax, torch.Tensor]:
        """Attention of one tile: the online softmax of its rows [G, R], and the pairs each head visited [G]."""
        end = self.geometry.tile_end(tile, self.high)
        results = [self.attend_head(head, rows, end) for head in range(len(self.query))]
        softmax = OnlineSoftmax(
            *(torch.stack(parts) for parts in zip(*((s.maximum, s.mass, s.total) for s, _ in results), strict=True))
        )
        pairs = [keys * (rows.stop - rows.start) for _, keys in results]
        return softmax, torch.tensor(pairs, device=self.key.device)

    def attend_head(self, head: int, rows: slice, end: int) -> tuple[OnlineSoftmax, int]:
        """Both passes for one head of a tile; also the keys visited, counted in blocks."""
        query, ranked, log_weight = self.query[head, rows], self.lists[head], self.log_weights[head]
        seen, dense = self.seen[head, rows], slice(self.low, end)
        softmax = OnlineSoftmax.empty(query, self.value.shape[-1])
        if end > self.low:
            logits = self.logits(query, self.key[dense])
            softmax.add(logits.masked_fill(~seen[:, dense], -math.inf), self.value[dense])
        keys = round_up(max(0, end - self.low))
        chunk = self.config.chunk if self.config.stop == "gain" else max(1, len(ranked))
        for start in range(0, len(ranked), chunk):
            part = slice(start, start + chunk)
            index = ranked[part]
            logits = self.weigh(self.logits(query, self.key[index]), log_weight[part], head, rows)
            gain = softmax.add(logits.masked_fill(~seen[:, index], -math.inf), self.value[index])
            keys += round_up(len(index))
            if self.config.stop == "gain" and bool((gain < self.config.threshold).all()):
                break
        if self.config.has_means:
            softmax.add(*self.means(query, ranked))
            keys += round_up(self.geometry.history_blocks(self.low, self.high))
        return softmax, keys

    def weigh(self, logits: torch.Tensor, log_weight: torch.Tensor, head: int, rows: slice) -> torch.Tensor:
        """Add the log-weights [N] to the logits [R, N] of a head's rows, as far as `sampling.MOST` lets them."""
        weighed = logits + log_weight
        if not self.config.bounds_weights(self.key.shape[1]):
            return weighed
        place = torch.arange(rows.start, rows.stop, device=logits.device) - self.rows.start
        lse = self.guide_lse[head % len(self.guide_lse), place // self.config.pool]
        most = most_logits(lse, self.config.threshold)
        return torch.minimum(weighed, torch.maximum(logits, most[:, None]))

    def means(self, query: torch.Tensor, ranked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [R, blocks] and values [blocks, Dv] of the block means that stand for keys not listed.

        A block's mean is over all its keys in the history; its weight is the number of them that were not listed.
        """
        history = self.history & self.seen[:, self.rows.start : self.rows.stop].any(1).any(0)
        skipped = history.clone()
        skipped[ranked] = False
        blocks = self.positions // BLOCK
        members = torch.nn.functional.one_hot(blocks).T.to(query.dtype)
        share = members * history / (members * history).sum(-1, keepdim=True).clamp_min(1)
        # A product with zero would spread a NaN of one key to all blocks.
        means = [torch.stack([row[row > 0] @ x[row > 0] for row in share]) for x in (self.key, self.value)]
        count = members @ skipped.to(query.dtype)
        used = count > 0
        return self.logits(query, means[0][used]) + count[used].log(), means[1][used]
