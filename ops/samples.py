"""The queries of a sequence over ranks by which all ranks choose alike, gathered to be the `Part` of each call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .config import S2OConfig
from .layout import Block
from .part import Part, SampledQueries
from .process_group import start_sampling
from .rule.channels import sampling_step
from .rule.guides import pool_guides
from .rule.output_weighting import sampled_rows
from .visibility import Visibility


class Samples(NamedTuple):
    """Which rows of a sequence are gathered, positions [n]; None for none. Those of `guides` count pooled queries."""

    guides: torch.Tensor | None
    outputs: torch.Tensor | None

    @classmethod
    def of(cls, query: torch.Tensor, kv_heads: int, length: int, config: S2OConfig) -> Samples:
        """What a call of all `length` queries takes for its sample, given those of a rank [B, Hq, L, D]."""
        guides = outputs = None
        if not query.numel() or not kv_heads:
            return cls(None, None)
        ranking, group_size = config.ranking, query.shape[1] // kv_heads
        if ranking.channels is not None and ranking.channels < query.shape[3]:
            pooled, heads = -(-length // ranking.pool), group_size if ranking.guides == "head" else 1
            guides = torch.arange(0, pooled, sampling_step(heads * pooled), device=query.device)
        if ranking.measure == "output":
            outputs = sampled_rows(length, group_size, query.device)
        return cls(guides, outputs)

    def start_gathering(
        self, query: torch.Tensor, kv_heads: int, config: S2OConfig, blocks: Sequence[Block], group: Any
    ) -> Callable[[Visibility, Callable[[], Any]], Part]:
        """Begin to gather the rows, those of a rank being its blocks.

        Returns:
            What waits for them, given the mask of the sequence and what waits for values.
        """
        guides = outputs = None
        if self.guides is not None:
            pooled = pool_guides(query.unflatten(1, (kv_heads, -1)), config)
            of_pooled = [block.pooled(config.ranking.pool) for block in blocks]
            guides = start_sampling(pooled, self.guides, of_pooled, group)
        if self.outputs is not None:
            outputs = start_sampling(query, self.outputs, blocks, group)

        def wait(terms: Visibility, arrive: Callable[[], Any]) -> Part:
            for gathering in (guides, outputs):
                if gathering is not None:
                    gathering.wait()
            sampled = None
            if outputs is not None and self.outputs is not None:
                sampled = SampledQueries(outputs.rows, self.outputs, terms)
            return Part(None if guides is None else guides.rows, sampled, arrive=arrive)

        return wait
