"""The keys that the segments of a KV head visit beside their dense spans, by importance."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..devices import has_fast_bfloat16
from ..geometry import BLOCK, round_up
from ..memory import workspace
from ..rule.sampling import draws
from ..rule.softmax import soft_cap
from . import flash
from .kv_head import KVHead

_SCORES_OF_A_RUN = 2**25
"""How many scores the segments of a run have at most."""
_SCORES_AT_ONCE = 2**20
"""How many scores are held at once: few enough to stay in the cache."""
_KEYS_AT_ONCE = 512
"""How many keys have these scores at most."""
_KEYS_OF_KERNEL = 512
"""How many keys the fused kernel takes at a time."""
_EXTRA_CHANNELS = 4
"""Channels that are added to guides and keys: two for the normaliser, two for alignment."""
_NO_SHARE = 1e30
"""A log-sum-exp that leaves a guide no share in any key; negated, one that gives it all of every key."""


@dataclass
class Lists:
    """The keys to visit of the `segments` of a run, one list after another.

    `keys` holds all lists end to end, and one key more, of weight 0; `log_weight` goes with it. List l of segment s
    of the run has `count`[s, l] of them, from `start`[s, l]. Of the `history` [segments, keys] it lists those to
    `keep` [segments, lists, keys]. `lse` [segments, heads or 1, n] are the guides' log-sum-exps, None where all of a
    list is visited.
    """

    segments: range
    keys: torch.Tensor
    log_weight: torch.Tensor
    start: torch.Tensor
    count: torch.Tensor
    history: torch.Tensor
    keep: torch.Tensor
    lse: torch.Tensor | None

    def left_per_block(self) -> torch.Tensor:
        """How many keys of each block are not listed [segments, lists, blocks]."""
        left = self.history[:, None] & ~self.keep
        return pad(left, (0, -left.shape[2] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)


@dataclass
class Run:
    """Consecutive segments that are ranked together.

    `reach` are the keys that they rank, and some between those. `history` [segments, keys] says which of these each
    segment ranks; `seen` [segments, heads or 1, n, keys] which each guide sees, None where that is the whole history.
    `guides` is n, the most that a list of a segment has.
    """

    segments: range
    guides: int
    reach: range
    history: torch.Tensor
    seen: torch.Tensor | None


class KeyRanking:
    """The ranking of the keys of one KV head.

    Args:
        kv_head: The KV head.
        near: Each guide's log-sum-exp over its dense span [heads, segments, n].
    """

    def __init__(self, kv_head: KVHead, near: torch.Tensor) -> None:
        self.kv_head, self.geometry, self.config = kv_head, kv_head.geometry, kv_head.config
        self.real, self.near = kv_head.real_guides, near.transpose(0, 1)
        self.positions = kv_head.arange(self.geometry.keys)
        self.starts, self.lows = kv_head.spans[:, :2].T.tolist()
        exact = kv_head.query.dtype
        is_exact = exact != torch.float32 or kv_head.softcap > 0 or not kv_head.query.is_cpu
        dtype = exact if is_exact or not has_fast_bfloat16() else torch.bfloat16
        self.comparable = dtype == torch.bfloat16 and kv_head.finite
        guides, key, neglected = kv_head.scored
        self.allowance = self.near.new_zeros(self.near.shape) if kv_head.merged is None else kv_head.merged.reach
        if neglected is not None:
            self.allowance = self.allowance.hypot(neglected.to(self.near.dtype))
        self.guides = widened(guides.transpose(0, 1), dtype)
        self.key = widened(-key, dtype)
        self.all_channel_guides = self.guides[..., :-_EXTRA_CHANNELS]
        if key is not kv_head.key:
            self.all_channel_guides = kv_head.guides.transpose(0, 1).to(dtype)
        self.key[:, -_EXTRA_CHANNELS : 2 - _EXTRA_CHANNELS] = 1
        self.max_scores = min(_SCORES_OF_A_RUN, workspace() // dtype.itemsize)
        self.scores_at_once = min(self.max_scores, _SCORES_AT_ONCE)
        self.buffer = self.key.new_empty(max(self.scores_at_once, self.rows * BLOCK))
        first, sample = self.config.ranking.first_keys, self.config.ranking.sample
        drawn = self.positions[sample // 2 :: sample]
        drawn = torch.cat([self.positions[:first], drawn[drawn >= first]])
        missing = -len(drawn) % BLOCK
        self.drawn = pad(drawn, (0, missing), value=self.geometry.keys)
        self.drawn_key = pad(kv_head.key[drawn].to(dtype), (0, 0, 0, missing))
        self.drawn_weight = self.near.new_full(self.drawn.shape, math.log(sample)).masked_fill(self.drawn < first, 0)

    @property
    def rows(self) -> int:
        """Guides of a segment, of all heads."""
        return self.guides.shape[1] * self.guides.shape[2]

    def runs(self) -> Iterator[range]:
        """Consecutive segments that have `max_scores` scores together, or one that has more."""
        first, ranked = 0, self.geometry.ranked_segments
        while first < ranked:
            end = first + 1
            while end < ranked and self.scores(range(first, end + 1)) <= self.max_scores:
                end += 1
            yield range(first, end)
            first = end

    def scores(self, segments: range) -> int:
        """How many scores the segments of a run have."""
        return len(segments) * self.rows * len(self.reach(segments))

    def reach(self, segments: range) -> range:
        """The keys that the segments of a run rank, and some between them."""
        end = self.lows[segments[-1]] if self.geometry.is_causal else self.geometry.keys
        return range(self.starts[segments[0]], end)

    def lists(self, segments: range) -> Lists:
        """The keys to visit of each segment of a run."""
        config, run = self.config, self.run(segments)
        keep, log_weight = run.history[:, None].expand(-1, self.kv_head.lists, -1), self.near.new_zeros(())
        if run.seen is not None:
            keep = keep & self.by_list(run.seen.any(2, keepdim=True)).any(2)
        if config.threshold == 0 or not run.reach:
            return pack(run, keep, keep.nonzero()[:, -1], log_weight)
        normaliser = self.normaliser(run)
        importance = self.importance(run, normaliser)
        if config.ranking.rule == "gain":
            ranked = importance.clamp_min(-1e30).masked_fill(~keep, -math.inf)
            order = ranked.argsort(dim=-1, descending=True, stable=True)
            listed = self.kv_head.arange(len(run.reach)) < keep.sum(-1, keepdim=True)
            return pack(run, keep, order[listed], log_weight, normaliser)
        bar = math.log(config.threshold)
        if not config.has_samples:
            keep = keep & (importance >= bar)
            return pack(run, keep, keep.nonzero()[:, -1], log_weight, normaliser)
        segment = self.geometry.first_number + self.kv_head.arange(segments.start, segments.stop)[:, None]
        drawn = draws(self.positions[span(run.reach)], segment).log_().to(importance.dtype).add_(bar)
        keep = keep & (importance >= drawn[:, None])
        index = keep.flatten().nonzero()[:, 0]
        log_weight = (bar - importance.take(index)).clamp_min_(0)
        return pack(run, keep, index % len(run.reach), log_weight, normaliser)

    def run(self, segments: range) -> Run:
        """The segments of a run, with the keys that they may visit."""
        reach = self.reach(segments)
        history = self.geometry.history(self.positions[span(reach)], self.kv_head.spans[span(segments)])
        if self.kv_head.valid is not None:
            history = history & self.kv_head.valid[span(reach)]
        seen = self.seen(segments, reach) if self.kv_head.visibility.rows_differ else None
        guides = self.real.shape[2] if self.kv_head.merged is None else int(self.real[span(segments)].sum(-1).max())
        return Run(segments, guides, reach, history, seen)

    def blocks(self, run: Run) -> Iterator[tuple[tuple[slice, slice], Run]]:
        """Blocks of the run that have `scores_at_once`, with their segments and keys in it; keys that segments see."""
        width = max(BLOCK, min(_KEYS_AT_ONCE, self.scores_at_once // self.rows) // BLOCK * BLOCK)
        size = max(1, self.scores_at_once // (width * self.rows))
        ends = self.lows[span(run.segments)] if self.geometry.is_causal else []
        for first in range(0, len(run.reach), width):
            keys = slice(first, first + width)
            for start in range(bisect_right(ends, run.reach[first]), len(run.segments), size):
                segments = slice(start, start + size)
                seen = None if run.seen is None else run.seen[segments, ..., keys]
                history = run.history[segments, keys]
                yield (segments, keys), Run(run.segments[segments], run.guides, run.reach[keys], history, seen)

    def seen(self, segments: range, reach: range) -> torch.Tensor:
        """The keys in reach that each guide sees [segments, heads or 1, n, keys], boolean."""
        heads, per_segment = self.guides.shape[1:3]
        row = self.kv_head.arange(segments.start * per_segment, segments.stop * per_segment) * self.config.ranking.pool
        row = row.view(-1, 1, per_segment, 1)
        seen = self.kv_head.seen(self.kv_head.arange(heads)[:, None, None], row, self.positions[span(reach)])
        return (seen & self.real[span(segments), ..., None]).expand(-1, -1, -1, len(reach))

    def by_list(self, x: torch.Tensor) -> torch.Tensor:
        """Values of heads and guides [segments, heads or 1, n, keys], by list [segments, lists, guides, keys]."""
        return x.expand(-1, self.guides.shape[1], -1, -1).unflatten(1, (self.kv_head.lists, -1)).flatten(2, 3)

    def normaliser(self, run: Run) -> torch.Tensor:
        """Each guide's log-sum-exp [segments, heads or 1, n]."""
        near, real = (x[span(run.segments), :, : run.guides] for x in (self.near, self.real))
        return torch.logaddexp(near, self.far(run)).clamp_min(-_NO_SHARE).masked_fill(~real, _NO_SHARE)

    def importance(self, run: Run, normaliser: torch.Tensor) -> torch.Tensor:
        """The log of the importance of the keys in reach [segments, lists, keys]."""
        importance = normaliser.new_full((len(run.segments), self.kv_head.lists, len(run.reach)), -math.inf)
        normaliser = normaliser - self.allowance[span(run.segments), :, : run.guides]
        guides = self.guides[span(run.segments), :, : run.guides]
        guides[..., -_EXTRA_CHANNELS] = normaliser
        guides[..., 1 - _EXTRA_CHANNELS] = normaliser - guides[..., -_EXTRA_CHANNELS]
        for (segments, keys), block in self.blocks(run):
            surprisal = self.surprisal(guides[segments], normaliser[segments], block.reach)
            if block.seen is not None:
                surprisal.masked_fill_(~block.seen, math.inf)
            importance[segments, :, keys] = self.combined(self.by_list(surprisal))
        if self.config.ranking.combine == "mean":
            of_list = self.real[span(run.segments)].sum(-1, keepdim=True) * (guides.shape[1] // self.kv_head.lists)
            importance -= of_list.to(importance.dtype).log()
        if self.config.ranking.measure == "output":
            importance += self.kv_head.log_distances[span(run.reach)]
        importance.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        importance[..., : max(0, self.config.ranking.first_keys - run.reach.start)] = math.inf
        return importance

    def combined(self, surprisal: torch.Tensor) -> torch.Tensor:
        """The log of the largest or of the summed probability over guides [segments, lists, guides, keys]."""
        if self.config.ranking.combine == "mean":
            return surprisal.neg().logsumexp(2)
        return (least_by_bits(surprisal, 2) if self.comparable else surprisal.amin(2)).neg_()

    def surprisal(self, guides: torch.Tensor, normaliser: torch.Tensor, reach: range) -> torch.Tensor:
        """Negative log-probabilities of the keys in reach [segments, heads, guides, keys].

        The normaliser enters the product as two more channels of guides, its high and its low part; with a soft cap,
        it comes after.
        """
        softcap, key = self.kv_head.softcap, self.key[span(reach)]
        if softcap:
            guides, key = guides[..., :-_EXTRA_CHANNELS], key[:, :-_EXTRA_CHANNELS]
        rows = guides.flatten(0, 2)
        product = self.buffer[: len(rows) * len(reach)].view(len(rows), len(reach))
        torch.mm(rows, key.T, out=product)
        product = product.unflatten(0, normaliser.shape)
        return soft_cap(product, softcap).add_(normaliser[..., None]) if softcap else product

    def far(self, run: Run) -> torch.Tensor:
        """Each guide's log-sum-exp over its history [segments, heads, guides], from one key in `sample` of it."""
        guides = self.all_channel_guides[span(run.segments), :, : run.guides]
        if not run.reach:
            return self.near.new_full(guides.shape[:3], -math.inf)
        first, end = (int((self.drawn < place).sum()) for place in (run.reach.start, run.reach.stop))
        # Blocks of the kernel begin and end at the same keys in each run, so that sums have the same order.
        chosen = slice(first // _KEYS_OF_KERNEL * _KEYS_OF_KERNEL, round_up(end))
        place = self.drawn[chosen] - run.reach.start
        inside = (place >= 0) & (place < len(run.reach))
        place = torch.where(inside, place, 0)
        bias = self.drawn_weight[chosen].masked_fill(~(run.history[:, place] & inside), -math.inf)[:, None, None]
        if run.seen is not None:
            seen = run.seen[..., place].expand(-1, guides.shape[1], -1, -1).flatten(1, 2)
            bias = torch.where(seen[:, None], bias, -math.inf)
        key = self.drawn_key[chosen].expand(len(run.segments), -1, -1)
        rows = guides.flatten(1, 2)[:, None]
        lse = flash.attend(rows, key, key, bias, self.kv_head.softcap, self.kv_head.finite)[1]
        return lse[:, 0].unflatten(1, guides.shape[1:3]).to(self.near.dtype)


def span(part: range) -> slice:
    """A range as an index."""
    return slice(part.start, part.stop)


def widened(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """X [..., channels] in another dtype, with extra channels of zeros."""
    wider = x.new_zeros(*x.shape[:-1], x.shape[-1] + _EXTRA_CHANNELS, dtype=dtype)
    wider[..., :-_EXTRA_CHANNELS] = x
    return wider


def pack(
    run: Run, keep: torch.Tensor, places: torch.Tensor, log_weight: torch.Tensor, lse: torch.Tensor | None = None
) -> Lists:
    """The `places` in reach of lists that `keep` [segments, lists, keys] of the history, end to end."""
    count = keep.sum(-1)
    return Lists(
        run.segments,
        pad(places + run.reach.start, (0, 1)),
        pad(log_weight.expand(len(places)), (0, 1), value=-math.inf),
        (count.flatten().cumsum(0) - count.flatten()).view_as(count),
        count,
        run.history,
        keep,
        lse,
    )


def least_by_bits(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The least of bfloat16 numbers along `dim`, or where some are negative, one of these.

    The bits of non-negative floats are in the order of the numbers, and integers are compared several times as fast.
    """
    return x.view(torch.int16).amin(dim).view(torch.bfloat16)
