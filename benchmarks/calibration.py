"""How well a calibration on one text keeps its error budget on others, and what it saves over one threshold for all.

    python -m benchmarks.calibration --length 4096 --texts 2

The model (SmolLM2-135M by default) is calibrated on one document per budget; then each attention call of other
documents is compared with dense attention, on all its rows, at the threshold of its site, at the budget as the
threshold (`error_budget` without calibration), and at a grid of thresholds for all sites, between which is
interpolated. The last column is the density if each KV group of a site had its own threshold, at the site's budget on
the same text, over that of one threshold a site: what settings by head could save at most.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy
import typer
from rich.console import Console
from rich.table import Table

from s2o_compile import Calibration, S2OConfig, calibrate
from s2o_compile.calibration.sites import SiteCall, call_sites
from s2o_compile.cli.options import Device, Json, read_config
from s2o_compile.demo.document import build_document, check_document, read_texts
from s2o_compile.demo.measure import prefill_inputs
from s2o_compile.demo.model import choose_device, choose_dtype, load_model
from s2o_compile.demo.progress import Progress

from .command import run

GRID = tuple(2.0**power for power in range(-9, -2))
"""Thresholds for all sites."""
WITHIN = 1.5


@dataclasses.dataclass(frozen=True)
class Point:
    """A call at a threshold, by KV group: shares of its dense attention, and squared error over the squares of all."""

    density: list[float]
    error: list[float]

    @classmethod
    def of(cls, call: SiteCall, threshold: float) -> Point:
        """Measure a call."""
        result, groups = call.sparse(threshold), call.key.shape[1]
        dense = call.dense.float()
        squares = (result.output.float() - dense).square().sum((0, 2, 3)).view(groups, -1).sum(1)
        share = call.density(result).mean(0).view(groups, -1).mean(1)
        return cls(share.tolist(), (squares / dense.square().sum()).tolist())

    @property
    def all(self) -> tuple[float, float]:
        """Density and relative squared error of all groups."""
        return statistics.mean(self.density), sum(self.error)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A call of a text that the calibrations did not see: by budget, as calibrated and alone; and on the grid."""

    site: str
    calibrated: dict[float, Point]
    alone: dict[float, Point]
    grid: list[Point]


@dataclasses.dataclass(frozen=True)
class Row:
    """How a rule keeps a budget: errors over the budget, and the mean density."""

    budget: float
    rule: str
    median: float
    worst: float
    within: float
    density: float
    by_group: float | None = None

    @classmethod
    def of(cls, budget: float, rule: str, points: Iterable[tuple[float, float]], by_group: float | None = None) -> Row:
        """Sum up the densities and errors of calls."""
        densities, errors = zip(*points, strict=True)
        ratios = [error / budget for error in errors]
        within = sum(ratio <= WITHIN for ratio in ratios) / len(ratios)
        return cls(budget, rule, statistics.median(ratios), max(ratios), within, statistics.mean(densities), by_group)


def measure(call: SiteCall, calibrations: Sequence[Calibration]) -> HeldOut:
    """All that is wanted of a call; sites that a calibration leaves dense have no error."""
    calibrated = {}
    for found in calibrations:
        site, groups = found.sites[call.site], call.key.shape[1]
        dense = Point([1.0] * groups, [0.0] * groups)
        calibrated[found.error_budget] = dense if site.dense else Point.of(call, site.threshold or 0.0)
    alone = {budget: Point.of(call, budget) for budget in calibrated}
    return HeldOut(call.site, calibrated, alone, [Point.of(call, threshold) for threshold in GRID])


def rows(calls: list[HeldOut], budget: float) -> list[Row]:
    """The rules at a budget."""
    calibrated = [call.calibrated[budget].all for call in calls]
    target = statistics.mean(error for _, error in calibrated)
    alone = [call.alone[budget].all for call in calls]
    saved = statistics.mean(by_group(call.grid, budget) for call in calls)
    found = [Row.of(budget, "calibrated", calibrated, saved), Row.of(budget, "the budget as threshold", alone)]
    if target > 0:  # or all sites were left dense
        same = one_threshold([call.grid for call in calls], target)
        found.insert(1, Row.of(budget, "one threshold, same mean error", same))
    return found


def one_threshold(curves: list[list[Point]], target: float) -> list[tuple[float, float]]:
    """Density and error of each call at the threshold for all that has a mean error."""
    densities, errors = numpy.moveaxis(numpy.array([[point.all for point in curve] for curve in curves]), 2, 0)
    place = numpy.interp(math.log(target), numpy.log(errors.mean(0)), range(len(GRID)))
    return [
        (_between(density, place), math.exp(_between(numpy.log(error), place)))
        for density, error in zip(densities, errors, strict=True)
    ]


def _between(values: Any, place: float) -> float:
    return float(numpy.interp(place, range(len(values)), values))


def by_group(curve: list[Point], budget: float) -> float:
    """The least density with a threshold for each KV group over that with one, both within a budget."""
    places = numpy.linspace(0, len(curve) - 1, 16 * len(curve))
    errors = numpy.array([point.error for point in curve]).clip(1e-12)
    densities = numpy.array([point.density for point in curve])
    grid = range(len(curve))
    error = numpy.exp([numpy.interp(places, grid, numpy.log(group)) for group in errors.T])
    density = numpy.array([numpy.interp(places, grid, group) for group in densities.T])
    fits = error.sum(0) <= budget
    if not fits.any():
        return 1.0
    best = single = density.mean(0)[fits].min()
    for price in numpy.geomspace(1e-3, 1e5, 200):
        chosen = (density + price * error).argmin(1)[:, None]
        if numpy.take_along_axis(error, chosen, 1).sum() <= budget:
            best = min(best, numpy.take_along_axis(density, chosen, 1).mean())
    return float(best / single)


def table(found: list[Row]) -> Table:
    """One line a budget and rule."""
    shown = Table("budget", "rule", "median error / budget", "worst", f"within {WITHIN:g}", "density", "by KV group")
    for row in found:
        shown.add_row(
            f"{row.budget:g}",
            row.rule,
            f"{row.median:.2f}",
            f"{row.worst:.2f}",
            f"{row.within:.0%}",
            f"{row.density:.3f}",
            "-" if row.by_group is None else f"{row.by_group:.3f}",
        )
    return shown


def main(
    budget: Annotated[list[float] | None, typer.Option(help="An error budget; 1e-3, 3e-3 and 1e-2.")] = None,
    length: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 4096,
    held_out_length: Annotated[int | None, typer.Option(help="Tokens of the other texts; as many by default.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many other texts.")] = 2,
    model: Annotated[str | None, typer.Option(help="A transformers model; SmolLM2-135M by default.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Calibrate a model on one text and measure its errors on others."""
    place, progress = choose_device(device), Progress()
    budgets = budget or [1e-3, 3e-3, 1e-2]
    for one in budgets:
        read_config(None, None, [f"error_budget={one}"])
    check_document(document, min(length, held_out_length or length))
    loaded, tokenizer = load_model(model, place, choose_dtype("auto", place))
    pieces = read_texts(document)
    lengths = [length] + [held_out_length or length] * texts
    documents = [build_document(tokenizer, pieces, tokens, seed) for seed, tokens in enumerate(lengths)]
    seen, *others = (prefill_inputs(text, place) for text in documents)
    calibrations = [calibrate(loaded, seen, error_budget=one, output=None) for one in budgets]
    calls: list[HeldOut] = []
    with progress.step("Other texts") as update:

        def handle(call: SiteCall) -> None:
            calls.append(measure(call, calibrations))
            update(done=len(calls), total=texts * len(calibrations[0].sites))

        for inputs in others:
            call_sites(loaded, inputs, S2OConfig(), handle, lambda decisions: None)
    found = [row for one in budgets for row in rows(calls, one)]
    if as_json:
        raw = [dataclasses.asdict(call) for call in calls]
        print(json.dumps({"rows": [dataclasses.asdict(row) for row in found], "grid": GRID, "calls": raw}))
    else:
        Console().print(table(found))


if __name__ == "__main__":
    run(main)
