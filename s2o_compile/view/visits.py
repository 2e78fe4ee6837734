"""Which keys one head visits, and in which order: what the operator does on a CPU, read off its own ranking."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..ops import S2OConfig
from ..ops.cpu import SegmentTrace, trace_head
from ..ops.geometry import Geometry
from ..ops.visibility import Visibility


@dataclass(frozen=True)
class Visit:
    """What one segment visits, of the keys that its queries may see.

    Attributes:
        segment: Its index.
        rows: Its queries.
        order: Key positions [n] as the operator comes to them: the dense span, then the history by falling importance.
        dense: How many of these are the dense span.
        importance: The log of the importance of the history [n - dense], in that order.
        sure: How many keys of `order` come before the stopping point. What is visited after it is a sample.
        visited: The keys that each query's tile visits [rows, Lk], by position.
    """

    segment: int
    rows: range
    order: torch.Tensor
    dense: int
    importance: torch.Tensor
    sure: int
    visited: torch.Tensor


def visits(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    head: int,
    is_causal: bool,
    scale: float,
    config: S2OConfig,
) -> Iterator[Visit]:
    """Attend the KV head of one query head as the operator does, and yield what each segment visits.

    Args:
        query: [1, Hq, Lq, D], on a CPU.
        key: [1, Hkv, Lk, D].
        value: [1, Hkv, Lk, Dv].
        head: Which query head.
        is_causal: Whether query i sees only the keys up to i.
        scale: Factor of the logits.
        config: The rule.
    """
    visibility = Visibility(is_causal).simplified(query.shape[2], key.shape[2])
    geometry = Geometry.of(query, key, visibility, config)
    for trace in trace_head(query, key, value, head, visibility, scale, config):
        yield _visit(geometry, config, trace)
    nothing = torch.zeros(0, dtype=torch.int64)
    for segment in range(geometry.ranked_segments, geometry.segments):
        unranked = SegmentTrace(segment, nothing, torch.zeros(geometry.keys), torch.zeros(geometry.tiles))
        yield _visit(geometry, config, unranked)


def _visit(geometry: Geometry, config: S2OConfig, trace: SegmentTrace) -> Visit:
    """The visit of one segment."""
    segment, listed = trace.segment, trace.listed
    span = geometry.span(segment)
    positions = torch.arange(geometry.keys)
    history = geometry.history(positions, torch.tensor([span]))[0].nonzero()[:, 0]
    importance, order = trace.importance[history].sort(descending=True, stable=True)
    rows = range(segment * config.ranking.segment, min((segment + 1) * config.ranking.segment, geometry.queries))
    visited = torch.zeros(len(rows), geometry.keys, dtype=torch.bool)
    furthest = 0
    for tile in range(rows.start // config.ranking.tile, -(-rows.stop // config.ranking.tile)):
        of_tile = visited[tile * config.ranking.tile - rows.start :][: config.ranking.tile]
        of_tile[:, span.low : geometry.tile_end(tile, span.high)] = True
        of_tile[:, listed[: int(trace.visited[tile])]] = True
        furthest = max(furthest, min(len(listed), int(trace.visited[tile])))
    if config.ranking.rule != "gain":
        bar = math.log(config.threshold) if config.threshold else -math.inf
        furthest = int((importance >= bar).sum())
    dense = span.high - span.low
    return Visit(
        segment,
        rows,
        torch.cat([positions[span.low : span.high], history[order]]),
        dense,
        importance,
        dense + furthest,
        visited,
    )
