"""The frontier's results: tables, work at equal error, and plots."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from s2o_compile.writing import replacing

from .judge import Score
from .results import record

MARKERS = "os^vD<>Pp*Xd1"
LINES = ("-", "--", "-.", ":")
AXES = {
    "work": "total work, share of dense attention's FLOPs",
    "density": "density, share of dense attention's pairs",
}
LEAST_ERROR = 1e-6
"""Where the plots end: below it, methods are dense attention."""

MEASURES: dict[str, tuple[str, str | None]] = {
    "density": ("share", None),
    "work": ("share of dense FLOPs", None),
    "error": ("relative squared error", None),
    "row_999": ("relative error", None),
    "row_max": ("relative error", None),
    "lse_error": ("nats", None),
    "work_at_target": ("share of dense FLOPs", None),
}


@dataclass(frozen=True)
class Point:
    """One setting of one method on one layer."""

    layer: str
    method: str
    dial: str
    setting: float
    is_default: bool
    score: Score


def points_table(points: list[Point], rows: str) -> Table:
    """Every point of one layer, the settings below their method; p99.9 and max are of the rows' relative errors."""
    title = f"{points[0].layer}: error against work, {rows}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("density", "work", "error", "p99.9", "max", "lse"):
        table.add_column(name, justify="right", no_wrap=True)
    for method, swept in itertools.groupby(points, lambda point: point.method):
        table.add_row(method)
        for point in swept:
            score = point.score
            losses = (f"{loss:.1e}" for loss in (score.error, score.row_999, score.row_max, score.lse_error))
            setting = f"  {point.dial} {point.setting:g}{', default' if point.is_default else ''}"
            table.add_row(setting, f"{score.density:.3f}", f"{score.work:.3f}", *losses)
    return table


def work_at(points: list[Point], target: float) -> tuple[str, float]:
    """The least work of one method on one layer that reaches an error, interpolated between logarithms.

    Returns:
        A sign and the work: "" where the target lies within the sweep, "<" where its least work reaches it already,
        ">" where its most work does not.
    """
    return least_cost([(point.score.work, point.score.error) for point in points], target)


def least_cost(points: Iterable[tuple[float, float]], target: float) -> tuple[str, float]:
    """The least cost at which a value that falls with it reaches a target, as `work_at`; points of cost and value."""
    curve = sorted(points)
    if curve[0][1] <= target:
        return "<", curve[0][0]
    for (less, worse), (more, better) in itertools.pairwise(curve):
        if better <= target:
            if not better:
                return "<", more
            share = math.log(worse / target) / math.log(worse / better)
            return "", less * (more / less) ** share
    return ">", curve[-1][0]


@dataclass(frozen=True)
class Reached:
    """The work at which a method reaches an error on a layer; `bound` is the sign of `work_at`."""

    layer: str
    method: str
    target: float
    bound: str
    work: float


def equal_error(points: list[Point], targets: dict[str, float]) -> list[Reached]:
    """The work of every method at the target of every layer."""
    found = []
    for method in dict.fromkeys(point.method for point in points):
        for layer, target in targets.items():
            own = [point for point in points if (point.layer, point.method) == (layer, method)]
            if own:
                found.append(Reached(layer, method, target, *work_at(own, target)))
    return found


def targets_table(reached: list[Reached], rows: str) -> Table:
    """Total work at equal error by method and layer, and its multiple of the first method's where both are known."""
    table = Table(title=f"Total work at equal error, {rows}", title_justify="left")
    table.add_column("method")
    first = {one.layer: one for one in reversed(reached)}
    for layer in dict.fromkeys(one.layer for one in reached):
        table.add_column(f"{layer}, {first[layer].target:g}", justify="right")
    for method, row in itertools.groupby(reached, lambda one: one.method):
        cells = []
        for one in row:
            base = first[one.layer]
            ratio = "" if one.bound or base.bound else f" ({one.work / base.work:.2f}x)"
            cells.append(f"{one.bound}{one.work:.3f}{ratio}")
        table.add_row(method, *cells)
    return table


def as_dict(points: list[Point], reached: list[Reached], rows: str, device: torch.device) -> dict[str, Any]:
    """Everything as a result: a row for each point and each target reached; `rows` says which rows were judged."""
    found = [asdict(point) | asdict(point.score) | {"work": point.score.work} for point in points]
    for one in found:
        del one["score"]
    found += [asdict(one) | {"work": None, "work_at_target": one.work} for one in reached]
    return record("frontier", found, ("layer", "method", "setting", "target"), MEASURES, device, {"rows": rows})


def save_plot(points: list[Point], against: str, rows: str, path: Path) -> None:
    """One panel a layer, one curve a method, its default filled; `against` is one of `AXES`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    layers = list(dict.fromkeys(point.layer for point in points))
    methods = list(dict.fromkeys(point.method for point in points))
    figure = Figure(figsize=(3.6 * len(layers) + 0.8, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for panel, layer in zip(panels, layers, strict=True):
        for number, method in enumerate(methods):
            _draw(panel, [point for point in points if (point.layer, point.method) == (layer, method)], number, against)
        panel.set(xscale="log", yscale="log", title=layer, xlabel=AXES[against])
        panel.set_ylim(bottom=LEAST_ERROR)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.grid(True, which="major", linewidth=0.4, alpha=0.6)
    panels[0].set_ylabel("relative squared error of the output")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(4, 2 * len(layers)), fontsize=8
    )
    figure.suptitle(f"filled: default setting; {rows}", fontsize=9)
    with replacing(path) as place:
        figure.savefig(place, dpi=200)


def _draw(panel: Any, points: list[Point], number: int, against: str) -> None:
    """One method's curve; markers and line styles differ so that it can be told apart in grey."""
    style = {"marker": MARKERS[number % len(MARKERS)], "color": f"C{number % 10}", "markersize": 5}

    def plot(some: list[Point], line: str, **more: Any) -> None:
        panel.plot([getattr(p.score, against) for p in some], [p.score.error for p in some], line, **style, **more)

    swept = sorted(points, key=lambda point: getattr(point.score, against))
    plot(swept, LINES[number % len(LINES)], markerfacecolor="none", linewidth=1.2, label=points[0].method)
    plot([point for point in points if point.is_default], "")
