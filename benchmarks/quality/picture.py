"""The picture of needles found, by depth and length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from s2o_compile.writing import replacing

from .cases import PLACES
from .run import Outcome
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

Grid = dict[tuple[float, int], list[bool]]
"""Whether each needle was found, by depth and length."""


def save_picture(outcomes: list[Outcome], path: Path) -> None:
    """Save a panel for each method, and for needles asked for in the middle and at the end.

    Outcomes of tasks whose depth does not matter are left out; without any others nothing is saved.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    single = [outcome for outcome in outcomes if TASKS[outcome.task].has_depth]
    if not single:
        return
    methods = list(dict.fromkeys(outcome.method for outcome in single))
    grids = [[needles(single, method, place) for method in methods] for place in PLACES]
    cells = {cell for row in grids for grid in row for cell in grid}
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    width, height = 0.55 * len(lengths) + 0.9, 0.4 * len(depths) + 0.9
    figure = Figure(figsize=(width * len(methods) + 1.2, 2 * height + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(PLACES), len(methods), sharex=True, sharey=True, squeeze=False)
    for row, place, own in zip(panels, PLACES, grids, strict=True):
        for panel, method, grid in zip(row, methods, own, strict=True):
            image = draw(panel, grid, depths, lengths)
            panel.set_title(method if place == PLACES[0] else "", fontsize=9)
        row[0].set_ylabel(f"asked, {place}\ndepth", fontsize=9)
    figure.supxlabel("tokens", fontsize=9)
    figure.colorbar(image, ax=panels, label="needles found", shrink=0.8)
    with replacing(path) as file:
        figure.savefig(file, dpi=150)


def needles(outcomes: list[Outcome], method: str, place: str) -> Grid:
    """The needles of one method and place."""
    grid: Grid = {}
    for outcome in outcomes:
        if outcome.method == method:
            for depth, found in zip(outcome.depths[place], outcome.found[place], strict=True):
                grid.setdefault((depth, outcome.length), []).append(found)
    return grid


def draw(panel: Axes, grid: Grid, depths: list[float], lengths: list[int]) -> AxesImage:
    """One heat map: a single ramp of lightness, and the counts in the cells, to be read in grey as well."""
    shares = [[_share(grid.get((depth, length), [])) for length in lengths] for depth in depths]
    image = panel.imshow(shares, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            found = grid.get((depth, length), [])
            colour = "black" if _share(found) > 0.5 else "white"
            panel.text(column, row, f"{sum(found)}/{len(found)}", ha="center", va="center", color=colour, fontsize=7)
    panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=7, rotation=45)
    panel.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=7)
    return image


def _share(found: list[bool]) -> float:
    return sum(found) / len(found) if found else float("nan")
