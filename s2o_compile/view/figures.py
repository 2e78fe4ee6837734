"""The pictures of a view, by matplotlib."""

from __future__ import annotations

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..ops.geometry import BLOCK
from ..plots import heat_map
from .head import Curve, Map
from .results import View

LEAST_MASS = 1e-6
"""Blocks with less of a query's softmax mass look alike."""
VISITED = "#ff2e63"


def figures(view: View) -> dict[str, Figure]:
    """All pictures, by name."""
    title = f"layer {view.head.layer}, head {view.head.head}"
    return {
        "density": heat_map([layer.density for layer in view.layers], "Density", "density (1 is dense)"),
        "error": heat_map([layer.error for layer in view.layers], "Relative error", "relative squared error", log=True),
        "by-position": _map(view.head.by_position, f"Keys by position, {title}", f"key position / {BLOCK}"),
        "by-importance": _map(
            view.head.by_importance, f"Keys by importance, {title}", f"place in the segment's order / {BLOCK}"
        ),
        "mass": _curves(view.head.curves, f"Mass of the first keys, {title}"),
    }


def _axes(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    return figure, axes


def _map(blocks: Map, title: str, keys: str) -> Figure:
    figure, axes = _axes(6.4, 5.6, title)
    norm = LogNorm(LEAST_MASS, 1, clip=True)
    mass = blocks.mass.masked_fill(blocks.visited.isnan(), float("nan"))
    image = axes.imshow(mass.numpy(), cmap="cividis", norm=norm, interpolation="nearest", aspect="auto")
    axes.add_collection(_squares(blocks.visited, 160 / max(mass.shape)))
    axes.set_xlabel(keys)
    axes.set_ylabel(f"query position / {BLOCK}")
    figure.colorbar(image, label="share of a query's softmax mass in the block", extend="min")
    return figure


def _squares(visited: torch.Tensor, width: float) -> PolyCollection:
    """In each block a square with the area of the share visited; lines of up to 1.2 points."""
    row, column = (visited > 0).nonzero().unbind(1)
    side = 0.45 * visited[row, column].sqrt()
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    centres = torch.stack([column, row], 1).float()
    squares = centres[:, None] + side[:, None, None] * corners
    return PolyCollection(list(squares.numpy()), facecolors="none", edgecolors=VISITED, linewidths=min(1.2, width / 4))


def _curves(curves: list[Curve], title: str) -> Figure:
    figure, axes = _axes(6.4, 4.2, title)
    for curve in curves:
        label = f"queries {curve.first_query:,} to {curve.last_query:,}"
        (line,) = axes.plot(curve.keys, curve.mass, label=label)
        stop = f"stops at {curve.stop:,} keys, mass {curve.mass_at_stop:.3f}; {curve.sampled:,} sampled after"
        axes.plot([curve.stop], [curve.mass_at_stop], "o", color=line.get_color(), label=stop)
    axes.set_xscale("log", subs=(2, 5))
    for format_ticks in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        format_ticks("{x:,.0f}")
    axes.set_xlabel("keys, the dense span first, then by falling importance")
    axes.set_ylabel("share of softmax mass")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    return figure
