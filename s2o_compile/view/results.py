"""What `visualize` found, as plain data."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from .head import HeadView


@dataclass(frozen=True)
class LayerFigures:
    """The operator beside dense attention, by query head of one layer.

    Attributes:
        density: Visited pairs over those that a dense kernel visits.
        error: Relative squared error of the output against dense attention in float32.
    """

    density: list[float]
    error: list[float]


@dataclass(frozen=True)
class View:
    """What sparse attention does to a model.

    Attributes:
        model: Its name.
        queries: Length of the prefill.
        config: The settings.
        layers: By call of attention.
        head: One head from near.
    """

    model: str
    queries: int
    config: dict[str, Any]
    layers: list[LayerFigures]
    head: HeadView

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the maps of the head."""
        head = self.head
        return {
            "model": self.model,
            "queries": self.queries,
            "config": self.config,
            "density": self.mean("density"),
            "error": self.mean("error"),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "head": {
                "layer": head.layer,
                "head": head.head,
                "density": self.layers[head.layer].density[head.head],
                "error": self.layers[head.layer].error[head.head],
                "curves": [dataclasses.asdict(curve) for curve in head.curves],
            },
        }

    def mean(self, figure: str) -> float:
        """The mean over all heads of "density" or "error"."""
        return statistics.fmean(value for layer in self.layers for value in getattr(layer, figure))
