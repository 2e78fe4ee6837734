"""Sparse attention in torch operations: one KV head of one batch entry at a time, and a run of segments at a time."""

from __future__ import annotations

import torch

from ..config import S2OConfig
from ..geometry import Geometry
from ..result import AttentionResult
from ..visibility import Visibility
from .attend import Attention
from .group import Group
from .rank import Ranking


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    config: S2OConfig,
) -> AttentionResult:
    """Sparse attention without sinks, of some queries and keys; shapes as in `ops.reference`.

    Arithmetic is in float32 at least, but for the scores that rank keys, which are in bfloat16 where that is fast.
    """
    config = visibility.ranking(config)
    geometry = Geometry.of(query, key, visibility, config)
    batch, groups = query.shape[0], key.shape[1]
    result = AttentionResult.empty(query, value, config.tile)
    parts = [x.unflatten(1, (groups, -1)) for x in result]
    for b in range(batch):
        for g in range(groups):
            group = Group.of(query, key, value, visibility, b, g, geometry, scale, softcap, config)
            attend_group(group, AttentionResult(*(part[b, g] for part in parts)))
    return result


def attend_group(group: Group, result: AttentionResult) -> None:
    """Attend one group and fill its part of `result`: [G, Lq, Dv], [G, Lq] and [G, tiles]."""
    attention = Attention(group)
    if group.geometry.ranked_segments:
        ranking = Ranking(group, attention.guide_lse())
        for segments in ranking.runs():
            attention.visit(ranking.lists(segments))
    attention.write(result)
