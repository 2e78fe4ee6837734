"""What each segment of one query head lists and visits, observed while the implementation runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..config import S2OConfig
from ..geometry import Geometry
from ..visibility import Visibility
from .attend import Attention
from .kv_head import KVHead
from .rank import KeyRanking


@dataclass(frozen=True)
class SegmentTrace:
    """One ranked segment.

    Attributes:
        segment: Its index.
        listed: Positions of the listed keys [n], in the order in which they are visited.
        importance: The log of each key's importance [Lk], or of the keys up to the last that the segment may rank.
        visited: Listed keys that each tile of the call visited in this run [tiles], rounded up to whole blocks.
    """

    segment: int
    listed: torch.Tensor
    importance: torch.Tensor
    visited: torch.Tensor


def trace_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head: int,
    visibility: Visibility,
    scale: float,
    config: S2OConfig,
) -> Iterator[SegmentTrace]:
    """Run the KV head of query head `head` of the first batch entry, and yield each ranked segment.

    Args:
        query: [B, Hq, Lq, D], on a CPU.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        head: Which query head.
        visibility: What the mask says.
        scale: Factor of the logits.
        config: The rule.
    """
    config = visibility.effective_config(config, key.shape[2])
    geometry = Geometry.of(query, key, visibility, config)
    index, member = divmod(head, query.shape[1] // key.shape[1])
    kv_head = KVHead.of(query, key, value, visibility, 0, index, geometry, scale, 0.0, config)
    attention = Attention(kv_head)
    ranking = KeyRanking(kv_head, attention.guide_lse())
    which = member if kv_head.lists > 1 else 0
    for segments in ranking.runs():
        lists = ranking.lists(segments)
        before = attention.keys[:, member].clone()
        attention.visit(lists)
        visited = attention.keys[:, member] - before
        run = ranking.run(segments)
        importance = ranking.importance(run, ranking.normaliser(run))
        for place, segment in enumerate(segments):
            start, count = int(lists.start[place, which]), int(lists.count[place, which])
            yield SegmentTrace(segment, lists.keys[start : start + count], importance[place, which], visited)
