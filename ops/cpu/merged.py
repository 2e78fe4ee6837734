"""The alike queries of one KV head, merged to the guides of each list of keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from ..config import Ranking
from ..rule.merging import MERGED, Clusters, find_clusters


@dataclass(frozen=True)
class MergedQueries:
    """The queries of a KV head merged: n guides of each list and segment at most.

    Attributes:
        clusters: Of the queries [lists, segments, parts, `MERGED`] of the runs of positions of each head of a list.
        in_run: Which queries are real [segments, parts, `MERGED`].
        slots: The clusters that are guides, in order, those that are not `real` being any [lists, segments, n].
        real: Guides [segments, lists, n], boolean.
        segment: Positions of a segment.
    """

    clusters: Clusters
    in_run: torch.Tensor
    slots: torch.Tensor
    real: torch.Tensor
    segment: int

    @classmethod
    def of(cls, query: torch.Tensor, lists: int, covariance: torch.Tensor, ranking: Ranking) -> MergedQueries:
        """The queries [G, Lq, D] merged."""
        in_run = _in_runs(torch.ones_like(query[:, :, :1], dtype=torch.bool), lists, ranking.segment)[0, ..., 0]
        clusters = find_clusters(_in_runs(query, lists, ranking.segment), in_run, covariance, ranking.radius)
        size = in_run.shape[-1]
        is_guide = (torch.arange(size, device=query.device) < clusters.number[..., None]).flatten(2)
        n = int(is_guide.sum(-1).max())
        slots = is_guide.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :n]
        return cls(clusters, in_run, slots, is_guide.gather(-1, slots).transpose(0, 1), ranking.segment)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """Of queries [G, Lq, channels] the guides [lists, segments, n, channels]; zeros where not `real`."""
        lists = len(self.slots)
        means = self.clusters.means(_in_runs(x, lists, self.segment), self.in_run).flatten(2, 3)
        means = means.gather(2, self.slots[..., None].expand(-1, -1, -1, x.shape[-1]))
        return means.masked_fill(~self.real.transpose(0, 1)[..., None], 0)

    @functools.cached_property
    def reach(self) -> torch.Tensor:
        """How far guides reach [segments, lists, n]."""
        return self.clusters.reach.flatten(2).gather(-1, self.slots).transpose(0, 1)

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """The position of the first member of each guide, in its segment [segments, lists, n]."""
        parts, size = self.in_run.shape[-2:]
        run = torch.arange(parts, device=self.slots.device)[:, None] % (self.segment // size)
        return (self.clusters.first + run * size).flatten(2).gather(-1, self.slots).transpose(0, 1)

    @functools.cached_property
    def owner(self) -> torch.Tensor:
        """The guide of each query [segments, G, segment]; the first one past the end."""
        before = self.clusters.number.cumsum(-1) - self.clusters.number
        owner = torch.where(self.in_run, self.clusters.owner + before[..., None], 0).flatten(2)
        return owner.unflatten(2, (-1, self.segment)).transpose(0, 1).flatten(1, 2)


def _in_runs(x: torch.Tensor, lists: int, segment: int) -> torch.Tensor:
    """Rows of heads [G, Lq, C], by list, segment, and run of positions that are merged [lists, segments, parts, n, C].

    Zeros past the end; `parts` are heads by runs.
    """
    size = min(segment, MERGED)
    x = fill_up(x, segment).unflatten(1, (-1, segment // size, size))
    return x.unflatten(0, (lists, -1)).transpose(1, 2).flatten(2, 3)


def fill_up(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Rows of heads [G, n, C] with zeros up to a multiple of rows: a copy only if there are any to add."""
    missing = -x.shape[1] % multiple
    return pad(x, (0, 0, 0, missing)) if missing else x
