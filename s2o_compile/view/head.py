"""One head from near: its attention in blocks before and after the permutation, and the mass that its keys gather."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..ops import S2OConfig
from ..ops.geometry import BLOCK
from ..sdpa_intercept import SdpaInputs
from .visits import Visit, visits

POINTS = 200
"""Of a curve, at most."""


@dataclass(frozen=True)
class Map:
    """Attention in blocks of 64 queries and 64 keys, both [ceil(Lq / 64), ceil(Lk / 64)].

    Attributes:
        mass: The share of a query's softmax mass in the block, the mean of its queries.
        visited: The share of the block's visible pairs that are visited; NaN where none is visible.
    """

    mass: torch.Tensor
    visited: torch.Tensor


@dataclass(frozen=True)
class Curve:
    """The softmax mass of a segment's first keys, in the order in which the operator comes to them.

    Attributes:
        segment: Which segment.
        first_query: Its first query's position.
        last_query: Its last query's position.
        keys: Numbers of keys, the dense span first.
        mass: The share of dense attention's mass in so many, the mean of the segment's queries.
        stop: The number of keys at which the segment stops.
        mass_at_stop: The mass in these.
        sampled: How many keys after these are visited as a sample.
    """

    segment: int
    first_query: int
    last_query: int
    keys: list[int]
    mass: list[float]
    stop: int
    mass_at_stop: float
    sampled: int


@dataclass(frozen=True)
class HeadView:
    """What one head attends and visits.

    Attributes:
        layer: Its layer.
        head: Its number among the query heads.
        by_position: Keys in the order of their positions.
        by_importance: Each segment's keys in the order in which the operator comes to them.
        curves: Of a few segments.
    """

    layer: int
    head: int
    by_position: Map
    by_importance: Map
    curves: list[Curve]


def view_head(call: SdpaInputs, head: int, config: S2OConfig) -> HeadView:
    """Look at one head of a call, in float32 on a CPU.

    Args:
        call: Attention of one sequence, without a mask tensor.
        head: Which query head.
        config: The rule.
    """
    query, key, value = (x.detach().cpu() for x in (call.query, call.key, call.value))
    rows, keys = query.shape[2], key.shape[2]
    of_head, of_group = query[0, head].float(), key[0, head * key.shape[1] // query.shape[1]].float()
    by_position, by_importance = _Blocks(rows, keys), _Blocks(rows, keys)
    chosen = _quarters(-(-rows // config.ranking.segment))
    curves = []
    for visit in visits(query, key, value, head, call.is_causal, call.scale, config):
        row = torch.arange(visit.rows.start, visit.rows.stop)
        seen = torch.ones(len(row), keys, dtype=torch.bool)
        if call.is_causal:
            seen = torch.arange(keys) <= row[:, None]
        logits = of_head[row] @ of_group.T * call.scale
        mass = logits.masked_fill(~seen, -math.inf).softmax(-1)
        visited = visit.visited & seen
        by_position.add(row, mass, seen, visited)
        by_importance.add(row, *(x[:, visit.order] for x in (mass, seen, visited)))
        if visit.segment in chosen:
            curves.append(_curve(visit, mass.mean(0)[visit.order]))
    return HeadView(call.index, head, by_position.map(), by_importance.map(), curves)


def _quarters(segments: int) -> set[int]:
    """The segments that end the quarters of a call."""
    return {max(0, segments * quarter // 4 - 1) for quarter in range(1, 5)}


def _curve(visit: Visit, mass: torch.Tensor) -> Curve:
    total = mass.cumsum(0)
    shown = torch.logspace(math.log10(visit.dense), math.log10(len(mass)), POINTS, dtype=torch.float64)
    keys = shown.round().long().clamp(visit.dense, len(mass)).unique()
    return Curve(
        visit.segment,
        visit.rows.start,
        visit.rows.stop - 1,
        keys.tolist(),
        total[keys - 1].tolist(),
        visit.sure,
        float(total[visit.sure - 1]),
        int(visit.visited.any(0)[visit.order[visit.sure :]].sum()),
    )


class _Blocks:
    """Sums over blocks of `rows` queries and `keys` keys."""

    def __init__(self, rows: int, keys: int) -> None:
        self.rows, self.size = rows, -(-keys // BLOCK)
        self.mass, self.seen, self.visited = (torch.zeros(-(-rows // BLOCK), self.size) for _ in range(3))

    def add(self, row: torch.Tensor, mass: torch.Tensor, seen: torch.Tensor, visited: torch.Tensor) -> None:
        """Add queries at positions `row` [R] with values [R, n] of the first n keys."""
        for total, part in ((self.mass, mass), (self.seen, seen), (self.visited, visited)):
            padded = torch.nn.functional.pad(part.float(), (0, self.size * BLOCK - part.shape[1]))
            total.index_add_(0, row // BLOCK, padded.unflatten(1, (-1, BLOCK)).sum(-1))

    def map(self) -> Map:
        """The shares."""
        queries = (self.rows - torch.arange(len(self.mass)) * BLOCK).clamp_max(BLOCK)
        return Map(self.mass / queries[:, None], self.visited / self.seen)
