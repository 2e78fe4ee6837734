"""What sparse attention loses against dense attention of a captured layer, and what work it saves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from s2o_compile.ops.density import dense_pairs

from .baselines.blocks import pool
from .baselines.visit import Visit
from .captured import Layer

STRIP = 128
"""Consecutive positions that are judged, or left out, together."""


@dataclass(frozen=True)
class Loss:
    """What the judged rows of some heads lose: each [rows].

    Attributes:
        squared: Squared error of the output.
        norm: Squared norm of dense attention's output.
        lse: Log-sum-exp minus that of dense attention, in nats.
    """

    squared: torch.Tensor
    norm: torch.Tensor
    lse: torch.Tensor


@dataclass(frozen=True)
class Score:
    """A method's loss on a layer and its work.

    Attributes:
        density: Visited pairs over those of a dense kernel.
        ranking: FLOPs of the ranking's products over those of dense attention.
        error: Sum of the squared errors over the sum of the squared norms of dense attention's output.
        row_999: 99.9th percentile of the same ratio row by row.
        row_max: Its maximum.
        lse_error: Mean absolute error of the log-sum-exp, in nats.
    """

    density: float
    ranking: float
    error: float
    row_999: float
    row_max: float
    lse_error: float

    @property
    def work(self) -> float:
        """Total work as a share of dense attention's."""
        return self.density + self.ranking


def dense_flops(layer: Layer) -> float:
    """Of both products of dense causal attention, all heads."""
    pairs = layer.heads * dense_pairs(layer.length, layer.length, True, 0, STRIP)
    return 2.0 * pairs * (layer.key.shape[-1] + layer.value.shape[-1])


class Judge:
    """Dense attention of a layer, in float32, at the rows that are judged.

    Args:
        layer: The layer.
        every: Judge one strip of 128 positions in `every`; 1 judges every row.
    """

    def __init__(self, layer: Layer, every: int = 1) -> None:
        self.layer = layer
        strips = torch.arange(layer.length, device=layer.key.device) // STRIP
        self.judged = strips % every == min(every // 2, int(strips[-1]))
        everything = torch.ones(-(-layer.length // STRIP), 1, dtype=torch.bool, device=layer.key.device)
        dense = Visit(everything, STRIP, layer.length, ranking=0)
        results = [self.attend(head, dense) for head in range(layer.heads)]
        self.output, self.lse = (torch.stack(parts) for parts in zip(*results, strict=True))

    def attend(self, head: int, visit: Visit) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of one head over what it visits: output [rows, Dv] and log-sum-exp [rows] of the judged rows."""
        query, key, value = self.layer.head(head)
        means = None if visit.means is None else (pool(key, visit.block), pool(value, visit.block))
        results = []
        for tile, rows in self._tiles(visit.tile):
            keys = visit.keys(tile, self.layer.length)
            keys = keys[keys <= rows[-1]]
            logits = (query[rows] * self.layer.scale) @ key[keys].T
            late = (keys > rows[0]).nonzero()[:, 0]
            logits[:, late] = logits[:, late].masked_fill(keys[late] > rows[:, None], -math.inf)
            values = value[keys]
            if means is not None and visit.means is not None:
                stand = visit.means[tile].nonzero()[:, 0]
                more = (query[rows] * self.layer.scale) @ means[0][stand].T + math.log(visit.block)
                logits, values = torch.cat([logits, more], dim=1), torch.cat([values, means[1][stand]])
            lse = logits.logsumexp(-1)
            share = (logits - lse.masked_fill(lse == -math.inf, 0)[:, None]).exp()
            results.append((share @ values, lse))
        output, lse = (torch.cat(parts) for parts in zip(*results, strict=True))
        return output, lse

    def _tiles(self, size: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The index and the judged positions of each tile that has any."""
        for tile, judged in enumerate(self.judged.split(size)):
            if judged.any():
                yield tile, tile * size + judged.nonzero()[:, 0]

    def loss(self, head: int, output: torch.Tensor, lse: torch.Tensor) -> Loss:
        """What one head loses, given its output [rows, Dv] and log-sum-exp [rows] at the judged rows."""
        dense = self.output[head]
        return Loss((output - dense).square().sum(-1), dense.square().sum(-1), lse - self.lse[head])

    def score(self, losses: list[Loss], density: float, ranking: float) -> Score:
        """All heads together; `ranking` in FLOPs."""
        squared, norm, lse = (
            torch.cat([getattr(loss, name) for loss in losses]) for name in ("squared", "norm", "lse")
        )
        by_row = squared / norm
        count = max(1, math.ceil(len(by_row) / 1000))
        return Score(
            density=density,
            ranking=ranking / dense_flops(self.layer),
            error=float(squared.double().sum() / norm.double().sum()),
            row_999=float(by_row.topk(count).values[-1]),
            row_max=float(by_row.max()),
            lse_error=float(lse.abs().mean()),
        )
