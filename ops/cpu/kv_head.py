"""The inputs of one KV head of one batch entry, in the dtype and layout of the computation."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from ..config import S2OConfig
from ..geometry import Geometry
from ..part import Part, SampledQueries
from ..rule.channels import Projected, key_covariance, project_kv_head
from ..rule.guides import pool_guides
from ..rule.output_weighting import value_distances
from ..visibility import Visibility, masked
from .merged import MergedQueries, fill_up


@dataclass(frozen=True)
class KVHead:
    """One KV head and its G query heads.

    `query` [G, Lq, D] with the scale in it, `key` [Lk, D], `value` [Lk, Dv], `valid` [Lk] or None.
    Rows of padding are zero. `finite` says whether the tensors are known to be finite; `spans` [segments, 3] holds
    the segments' spans. `visibility` is that of the whole call, of which the KV head is at `batch`, from `first_head`.
    Of `part`, as of `visibility`, it is one KV head.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    valid: torch.Tensor | None
    finite: bool
    visibility: Visibility
    batch: int
    first_head: int
    softcap: float
    geometry: Geometry
    spans: torch.Tensor
    config: S2OConfig
    scale: float
    part: Part | None

    @classmethod
    def of(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visibility: Visibility,
        batch: int,
        index: int,
        geometry: Geometry,
        scale: float,
        softcap: float,
        config: S2OConfig,
        part: Part | None = None,
    ) -> KVHead:
        """KV head `index` of a batch entry, from the tensors of a call."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        valid = None if visibility.key_padding is None else visibility.key_padding[batch]
        members = query[batch].unflatten(0, (key.shape[1], -1))[index]
        keys, values = (masked(x[batch, index].to(dtype), valid).contiguous() for x in (key, value))
        members = (members.to(dtype) * scale).contiguous()
        # A sum is finite only if all its terms are.
        finite = all(math.isfinite(x.sum()) for x in (members, keys, values))
        spans = geometry.spans(range(geometry.segments), query.device)
        first_head = index * len(members)
        return cls(
            members, keys, values, valid, finite, visibility, batch, first_head, softcap, geometry, spans, config,
            scale, part,
        )  # fmt: skip

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.query)

    def arange(self, *ends: int) -> torch.Tensor:
        """``torch.arange`` on the device of the inputs."""
        return torch.arange(*ends, device=self.query.device)

    @functools.cached_property
    def pooled(self) -> torch.Tensor:
        """The pooled queries [G or 1, guides, D]."""
        return pool_guides(self.query, self.config)

    @functools.cached_property
    def guides(self) -> torch.Tensor:
        """The guides of each segment [G or 1, segments, n, D], or merged [lists, segments, n, D].

        Zeros past a ragged end, and where fewer guides are left than elsewhere.
        """
        return self.by_segment(self.pooled) if self.merged is None else self.merged.means(self.pooled)

    @functools.cached_property
    def merged(self) -> MergedQueries | None:
        """What queries are merged to guides; None where they are not."""
        if not self.config.ranking.merges:
            return None
        covariance = key_covariance(self.key, self.valid).to(self.query.dtype)
        return MergedQueries.of(self.pooled, self.lists, covariance, self.config.ranking)

    @functools.cached_property
    def scored(self) -> Projected:
        """The factors of the scores: guides [as in `guides`, channels] and keys [Lk, channels]."""
        sample = self.pooled
        if self.part is not None and self.part.guides is not None:
            sample = self.scaled(self.part.guides[self.batch, self.first_head // self.heads])
        channels = self.config.ranking.channels
        scored = project_kv_head(sample, self.key, channels, 1.0, self.valid, self.pooled)
        if scored.neglected is None:
            return scored._replace(guides=self.guides)
        of_segments = self.by_segment if self.merged is None else self.merged.means
        return scored._replace(guides=of_segments(scored.guides))

    @functools.cached_property
    def log_distances(self) -> torch.Tensor:
        """The logs of how far values lie from the outputs, in units of these [Lk]."""
        (query,), rows, visibility = self.sampled
        head = self.first_head + self.arange(self.heads)[:, None, None]
        seen = visibility.seen(self.batch, head, rows[:, None], self.arange(self.geometry.keys))
        return value_distances(query, self.key, self.value, seen, 1.0, self.softcap).log()

    @property
    def sampled(self) -> SampledQueries:
        """The queries by which the size of outputs is estimated, as those of `query` are [1, G, n, D]."""
        of_all = None if self.part is None else self.part.outputs
        if of_all is None:
            return SampledQueries.of(self.query[None], 1, self.visibility)
        own = slice(self.first_head, self.first_head + self.heads)
        return of_all._replace(query=self.scaled(of_all.query[self.batch, None, own]))

    def scaled(self, query: torch.Tensor) -> torch.Tensor:
        """Queries of a call as those of `query` are."""
        return query.to(self.query.dtype) * self.scale

    @functools.cached_property
    def real_guides(self) -> torch.Tensor:
        """Guides of each segment that are not past a ragged end [segments, G or 1, n], boolean; or `merged` ones."""
        if self.merged is not None:
            return self.merged.real
        pooled = -(-self.geometry.queries // self.config.ranking.pool)
        return self.by_segment(self.query.new_ones(1, pooled, 1, dtype=torch.bool))[:, :, :, 0].transpose(0, 1)

    def by_segment(self, guides: torch.Tensor) -> torch.Tensor:
        """Cut guides [heads, n, D] into segments [heads, segments, n, D], filled up with zeros."""
        size = self.config.ranking.segment // self.config.ranking.pool
        return fill_up(guides, size).unflatten(1, (-1, size))

    @property
    def lists(self) -> int:
        """Lists of keys per segment."""
        return 1 if self.config.ranking.lists == "kv_head" else self.heads

    def seen(self, head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """`Visibility.seen`, for query heads of the KV head; rows past the end see what the last one sees."""
        row = row.clamp_max(self.geometry.queries - 1)
        return self.visibility.seen(self.batch, self.first_head + head, row, key)
