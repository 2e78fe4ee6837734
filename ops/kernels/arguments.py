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
from ..rule.output_weighting import sampled_rows, value_distances
from ..visibility import Visibility, masked

LOG2_E = math.log2(math.e)


@dataclass
class Arguments:
    """The inputs of the kernels of one call: query [B, Hq, Lq, D], key [B, Hkv, Lk, D], value [B, Hkv, Lk, Dv]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    geometry: Geometry
    scale: float
    softcap: float
    config: S2OConfig

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

    @property
    def valid(self) -> torch.Tensor | None:
        """The keys that are not padding [B, 1, Lk]; None for all."""
        padding = self.visibility.key_padding
        return None if padding is None else padding[:, None]

    @property
    def takes_mean(self) -> bool:
        """Whether importance is the mean over guides, not their maximum."""
        return self.config.ranking.combine == "mean"

    def distances(self) -> torch.Tensor | None:
        """How far values lie from the outputs [B, Hkv, Lk], float32; None where importance measures mass alone."""
        if self.config.ranking.measure == "mass":
            return None
        device = self.query.device
        rows = sampled_rows(self.geometry.queries, self.group_size, device)
        batch, key = (torch.arange(size, device=device) for size in (self.query.shape[0], self.geometry.keys))
        head = torch.arange(self.query.shape[1], device=device).view(self.kv_heads, self.group_size, 1, 1)
        seen = self.visibility.seen(batch[:, None, None, None, None], head, rows[:, None], key)
        query = self.query.unflatten(1, (self.kv_heads, self.group_size))[:, :, :, rows]
        return value_distances(
            query, self.key, masked(self.value, self.valid), seen, self.scale, self.softcap
        ).contiguous()

    def capacity(self, segment: int) -> int:
        """The longest list of the segments up to `segment`, in whole blocks."""
        return round_up(self.geometry.longest_history(segment))

    @functools.cached_property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """The tensors that mask: padding, documents of queries, documents of keys, mask; a stand-in where absent."""
        absent = self.key.new_empty(1, 1, dtype=torch.bool)
        rows = (self.visibility.key_padding, self.visibility.query_documents, self.visibility.key_documents)
        mask = self.visibility.mask
        return *(absent if x is None else x.contiguous() for x in rows), absent if mask is None else mask

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
            "GUIDE_HEADS": self.group_size if self.config.ranking.guides == "head" else 1,
            "guides_per_head": -(-self.geometry.queries // self.config.ranking.pool),
            "HAS_PADDING": visibility.key_padding is not None,
            "DOCUMENTS": visibility.query_documents is not None,
            "MASK": visibility.mask is not None,
            "SOFTCAP": self.softcap > 0,
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
        }


@functools.cache
def padded(channels: int) -> int:
    """The channels of a block in a kernel: a power of two, at least 16."""
    return max(16, next_power_of_2(channels))
