"""Pictures of a run: needles found, by depth and length, and values lost and gained, by task."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .attention import DENSE
from .cases import PLACES
from .report import ALL, Lookups, count_lookups
from .run import Outcome
from .tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Grid = dict[tuple[float, int], list[bool]]
"""Whether each needle was found, by depth and length."""
LOST, GAINED = "#b04a2f", "#3f7fbf"


def depth_picture(outcomes: list[Outcome]) -> Figure | None:
    """A panel for each method, and for needles asked for in the middle and at the end.

    Outcomes of tasks whose depth does not matter are left out; without any others there is no picture.
    """
    single = [outcome for outcome in outcomes if TASKS[outcome.task].has_depth]
    if not single:
        return None
    methods = list(dict.fromkeys(outcome.method for outcome in single))
    grids = [[needles(single, method, place) for method in methods] for place in PLACES]
    cells = {cell for row in grids for grid in row for cell in grid}
    depths, lengths = sorted({depth for depth, _ in cells}), sorted({length for _, length in cells})
    width, height = 0.6 * len(lengths) + 1.0, 0.4 * len(depths) + 0.9
    figure = _figure(width * len(methods) + 1.2, 2 * height + 0.5)
    panels = figure.subplots(len(PLACES), len(methods), sharex=True, sharey=True, squeeze=False)
    for row, place, own in zip(panels, PLACES, grids, strict=True):
        for panel, method, grid in zip(row, methods, own, strict=True):
            image = draw(panel, grid, depths, lengths)
            panel.set_title(method if place == PLACES[0] else "", fontsize=9)
        row[0].set_ylabel(f"asked, {place}\ndepth", fontsize=9)
    figure.supxlabel("tokens", fontsize=9)
    figure.colorbar(image, ax=panels, label="needles found", shrink=0.8)
    return figure


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


def flips_picture(outcomes: list[Outcome], length: int) -> Figure | None:
    """At one length, bars to the left for values lost and to the right for those gained, a panel for each method."""
    lookups = [one for one in count_lookups(outcomes) if one.length == length and one.task != ALL]
    methods = [method for method in dict.fromkeys(one.method for one in lookups) if method != DENSE]
    if not methods:
        return None
    tasks = list(dict.fromkeys(one.task for one in lookups))
    figure = _figure(1.9 * len(methods) + 1.8, 2 * (0.22 * len(tasks) + 0.7))
    panels = figure.subplots(len(PLACES), len(methods), sharex=True, sharey=True, squeeze=False)
    for row, place in zip(panels, PLACES, strict=True):
        for panel, method in zip(row, methods, strict=True):
            own = [one for one in lookups if (one.place, one.method) == (place, method)]
            _draw_flips(panel, own, tasks)
            panel.set_title(method if place == PLACES[0] else "", fontsize=9)
        row[0].set_ylabel(f"asked, {place}", fontsize=9)
    figure.supxlabel(f"{length:,} tokens: share of the values asked for that are lost (left) and gained", fontsize=9)
    return figure


def _draw_flips(panel: Axes, own: list[Lookups], tasks: list[str]) -> None:
    for sign, name, colour in ((-1, "lost", LOST), (1, "gained", GAINED)):
        shares = {one.task: sign * getattr(one.flips, name) / max(1, one.flips.asked) for one in own}
        panel.barh(range(len(tasks)), [shares.get(task, 0.0) for task in tasks], color=colour, height=0.7)
    panel.axvline(0, color="black", linewidth=0.6)
    panel.set_yticks(range(len(tasks)), tasks, fontsize=7)
    panel.tick_params(axis="x", labelsize=7)
    panel.xaxis.set_major_formatter(lambda share, _: f"{abs(share):.0%}")
    panel.set_ylim(len(tasks) - 0.5, -0.5)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _share(found: list[bool]) -> float:
    return sum(found) / len(found) if found else float("nan")
