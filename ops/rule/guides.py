"""Guides: the pooled queries that score keys."""

from __future__ import annotations

import torch

from ..config import S2OConfig


def pool_guides(query: torch.Tensor, config: S2OConfig) -> torch.Tensor:
    """Average `pool` consecutive queries (fewer at a ragged end); with `guides` "kv_head", the heads of a KV head too.

    Args:
        query: [..., G, L, D], the G query heads of each KV head.
        config: Gives `pool` and `guides`.

    Returns:
        Guides [..., G or 1, ceil(L / pool), D].
    """
    length, pool = query.shape[-2], config.ranking.pool
    if pool > 1:
        whole = length // pool * pool
        guides = query[..., :whole, :].unflatten(-2, (-1, pool)).mean(-2)
        if whole < length:
            guides = torch.cat([guides, query[..., whole:, :].mean(-2, keepdim=True)], -2)
        query = guides
    return query.mean(-3, keepdim=True) if config.ranking.guides == "kv_head" else query
