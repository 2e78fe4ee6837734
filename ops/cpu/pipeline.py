"""Sparse attention in torch operations: one KV head of one batch entry at a time, and a run of segments at a time."""

from __future__ import annotations

import torch

from ..config import S2OConfig
from ..geometry import Geometry
from ..part import Part
from ..result import AttentionResult
from ..visibility import Visibility
from .attend import Attention
from .kv_head import KVHead
from .rank import KeyRanking


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    config: S2OConfig,
    part: Part | None = None,
) -> AttentionResult:
    """Sparse attention without sinks, of some queries and keys; shapes as in `ops.reference`.

    Queries may be a `part` of those of a sequence.
    Arithmetic is in float32 at least, but for the scores that rank keys, which are in bfloat16 where that is fast.
    """
    if part is not None:
        part.arrive()
    config = visibility.effective_config(config, key.shape[2])
    geometry = Geometry.of(query, key, visibility, config)
    batch, kv_heads = query.shape[0], key.shape[1]
    result = AttentionResult.empty(query, value, config.ranking.tile)
    parts = [x.unflatten(1, (kv_heads, -1)) for x in result]
    for b in range(batch):
        for h in range(kv_heads):
            kv_head = KVHead.of(query, key, value, visibility, b, h, geometry, scale, softcap, config, part)
            attend_kv_head(kv_head, AttentionResult(*(part[b, h] for part in parts)))
    return result


def attend_kv_head(kv_head: KVHead, result: AttentionResult) -> None:
    """Attend one KV head and fill its part of `result`: [G, Lq, Dv], [G, Lq] and [G, tiles]."""
    attention = Attention(kv_head)
    if kv_head.geometry.ranked_segments:
        ranking = KeyRanking(kv_head, attention.guide_lse())
        for segments in ranking.runs():
            attention.visit(ranking.lists(segments))
    attention.write(result)
