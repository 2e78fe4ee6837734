"""The tensors of a call, and the arguments that its kernels share."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from triton import next_power_of_2

from ..config import S2OConfig
from ..geometry import Geometry, round_up
from ..part import SampledQueries
from ..rule.output_weighting import value_distances
from ..visibility import Visibility, masked
from .positions import positions

LOG2_E = math.log2(math.e)


@dataclass
class Arguments:
    """The inputs of the kernels of one call: query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv].

    `distances` are those of `distances_of_values`, None where importance measures mass alone. Kernels run on `device`;
    the tensors may have no memory (`plan`), and then say nothing of it. `places` [Lk] int32 are `Places.rows`, None
    where keys follow one another.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    distances: torch.Tensor | None
    scale: float
    softcap: float
    config: S2OConfig
    device: torch.device
    places: torch.Tensor | None = None

    @functools.cached_property
    def geometry(self) -> Geometry:
        """The spans of the segments."""
        return Geometry.of(self.query, self.key, self.visibility, self.config)

    @property
    def kv_heads(self) -> int:
        """KV heads."""
        return self.key.shape[1]

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.kv_heads

    @property
    def batch_kv_heads(self) -> int:
        """KV heads of all batch entries."""
        return self.query.shape[0] * self.kv_heads

    @property
    def lists(self) -> int:
        """Lists per KV head and segment."""
        return self.group_size if self.config.ranking.lists == "head" else 1

    @functools.cached_property
    def rows(self) -> torch.Tensor:
        """The row of each key [Lk] int32: its place, or its position."""
        return positions(self.geometry.keys, self.key.device) if self.places is None else self.places

    @property
    def is_paged(self) -> bool:
        """Whether rows of keys are other than their positions."""
        return self.places is not None

    @property
    def valid(self) -> torch.Tensor | None:
        """The keys that are not padding [B, 1, Lk]; None for all."""
        padding = self.visibility.key_padding
        return None if padding is None else padding[:, None]

    @property
    def takes_mean(self) -> bool:
        """Whether importance is the mean over guides, not their maximum."""
        return self.config.ranking.combine == "mean"

    @property
    def guide_heads(self) -> int:
        """Heads of guides of a KV head; lists, where queries are merged."""
        if self.config.ranking.merges:
            return self.lists
        return self.group_size if self.config.ranking.guides == "head" else 1

    @property
    def guides_of_segment(self) -> int:
        """Guides of a segment and guide head; where queries are merged, the most that there may be."""
        ranking = self.config.ranking
        return self.group_size // self.lists * ranking.segment if ranking.merges else ranking.segment // ranking.pool

    @property
    def guides_per_head(self) -> int:
        """Guides of a guide head."""
        if self.config.ranking.merges:
            return self.geometry.segments * self.guides_of_segment
        return -(-self.geometry.queries // self.config.ranking.pool)

    def capacity(self, segment: int) -> int:
        """The longest list of the segments up to `segment`, in whole blocks."""
        return round_up(self.geometry.longest_history(segment))

    @functools.cached_property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """The tensors that mask: padding, documents of queries, documents of keys, mask; a stand-in where absent."""
        absent = self.key.new_empty(1, 1, dtype=torch.bool)
        return tuple(absent if x is None else x for x in self.visibility.tensors)

    @functools.cached_property
    def mask_strides(self) -> tuple[int, ...]:
        """The strides of `masks`: of the first three over the batch, of the last in 4 dimensions."""
        *rows, mask = self.masks
        full = (*self.query.shape[:3], self.geometry.keys)
        strides = (0,) * 4 if self.visibility.mask is None else mask.expand(full).stride()
        return *(x.stride(0) for x in rows), *strides

    @functools.cached_property
    def spans(self) -> dict[str, Any]:
        """The arguments of `helpers.span`."""
        return {
            "queries": self.geometry.queries,
            "keys": self.geometry.keys,
            "ranked_segments": self.geometry.ranked_segments,
            "offset": self.geometry.offset,
            "window": self.visibility.window or 0,
            "near_keys": self.geometry.near_keys,
            "SEGMENT": self.config.ranking.segment,
            "CAUSAL": self.visibility.is_causal,
            "WINDOW": self.visibility.window is not None,
        }

    @functools.cached_property
    def shared(self) -> dict[str, Any]:
        """The arguments that all kernels of queries or guides share: of spans, masks, guides and logits."""
        visibility = self.visibility
        return self.spans | {
            "kv_heads": self.kv_heads,
            "scale": self.scale * LOG2_E,
            "softcap": self.softcap * LOG2_E,
            "POOL": self.config.ranking.pool,
            "GUIDE_HEADS": self.guide_heads,
            "guides_per_head": self.guides_per_head,
            "HAS_PADDING": visibility.key_padding is not None,
            "DOCUMENTS": visibility.query_documents is not None,
            "MASK": visibility.mask is not None,
            "SOFTCAP": self.softcap > 0,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
        }


def distances_of_values(
    sampled: SampledQueries, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """How far values lie from the outputs [B, Hkv, Lk], float32, of tensors as in `Arguments`."""
    (batch, heads, _, _), (_, kv_heads, keys, _), device = sampled.query.shape, key.shape, key.device
    entry, head, column = (torch.arange(size, device=device) for size in (batch, heads, keys))
    head = head.view(kv_heads, heads // kv_heads, 1, 1)
    seen = sampled.visibility.seen(entry[:, None, None, None, None], head, sampled.rows[:, None], column)
    query = sampled.query.unflatten(1, (kv_heads, heads // kv_heads))
    padding = sampled.visibility.key_padding
    value = masked(value, None if padding is None else padding[:, None])
    return value_distances(query, key, value, seen, scale, softcap).contiguous()


@functools.cache
def padded(channels: int) -> int:
    """The channels of a block in a kernel: a power of two, at least 16."""
    return max(16, next_power_of_2(channels))
