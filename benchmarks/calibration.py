"""How well a calibration on one text keeps its error budget on others, beside simpler rules.

    python -m benchmarks.calibration --length 4096 --texts 2 --other prose.txt

The model (SmolLM2-135M by default) is calibrated on one document per budget. Then each attention call of other
documents is compared with dense attention, on all its rows, under four rules: the threshold of its site; that of a
calibration which leaves nothing of the budget to other texts; `S2OConfig(error_budget=...)`, without calibration; and
one threshold for all sites, interpolated on a grid, at which the mean error is that of the calibrated sites.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from s2o_compile import Calibration, S2OConfig, calibrate
from s2o_compile._console import Progress, UsageError
from s2o_compile.calibration.calibrate import MARGIN
from s2o_compile.calibration.sites import Measurement, SiteInputs, visit_sites
from s2o_compile.testbed.document import build_document, check_document, read_texts
from s2o_compile.testbed.model import choose_device, choose_dtype, load_model, model_name
from s2o_compile.testbed.options import Device, Json
from s2o_compile.testbed.predict import prefill_inputs

from .command import run, wide_console
from .results import as_text, record

GRID = tuple(2.0**power for power in range(-9, -2))
"""Thresholds for all sites."""
DENSE = Measurement(threshold=0.0, density=1.0, error=0.0)
WITHIN = 1.5
MEASURES: dict[str, tuple[str, str | None]] = {
    "median": ("budgets", None),
    "worst": ("budgets", None),
    "kept": ("share of calls", None),
    "within": ("share of calls", None),
    "density": ("share", None),
}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A call of a text that the calibrations did not see.

    Attributes:
        text: The number of the text, from 1.
        site: The name of the site.
        rules: What was measured, by rule, at each budget.
        grid: What was measured at each threshold of `GRID`.
    """

    text: int
    site: str
    rules: dict[str, list[Measurement]]
    grid: list[Measurement]


@dataclasses.dataclass(frozen=True)
class Row:
    """How a rule keeps a budget over all calls: errors in budgets, shares of calls, and the mean density."""

    budget: float
    rule: str
    median: float
    worst: float
    worst_at: str
    kept: float
    within: float
    density: float

    @classmethod
    def of(cls, budget: float, rule: str, calls: Sequence[HeldOut], found: Sequence[Measurement]) -> Row:
        """Sum up what was measured of the calls."""
        ratios = [point.error / budget for point in found]
        worst, call = max(zip(ratios, calls, strict=True), key=lambda pair: pair[0])
        kept, within = (statistics.mean(ratio <= most for ratio in ratios) for most in (1, WITHIN))
        density = statistics.mean(point.density for point in found)
        place = f"{call.site}, text {call.text}"
        return cls(budget, rule, statistics.median(ratios), worst, place, kept, within, density)


def measure_texts(
    model: torch.nn.Module,
    texts: Sequence[dict[str, Any]],
    calibrations: dict[str, list[Calibration]],
    budgets: Sequence[float],
) -> list[HeldOut]:
    """Measure the calls that a model makes for each text, under each rule and on the grid."""
    calls: list[HeldOut] = []
    with Progress().step("Other texts") as update:

        def handle(text: int, call: SiteInputs) -> None:
            rules = {rule: [as_calibrated(call, found) for found in each] for rule, each in calibrations.items()}
            rules["budget alone"] = [with_budget(call, budget) for budget in budgets]
            grid = [call.measure(threshold) for threshold in GRID]
            calls.append(HeldOut(text, call.site, rules, grid))
            update(done=len(calls), total=len(texts) * len(calibrations["calibrated"][0].sites))

        for text, inputs in enumerate(texts, 1):
            visit_sites(model, inputs, S2OConfig(), functools.partial(handle, text), lambda decisions: None)
    return calls


def as_calibrated(call: SiteInputs, calibration: Calibration) -> Measurement:
    """A call at the threshold of its site; dense ones have no error."""
    site = calibration.sites[call.site]
    return DENSE if site.dense else call.measure(site.threshold or 0.0)


def with_budget(call: SiteInputs, budget: float) -> Measurement:
    """A call under a budget without calibration."""
    settings = S2OConfig(error_budget=budget).arguments()
    return dataclasses.replace(call, options=call.options | settings).measure(settings["threshold"])


def rows(calls: Sequence[HeldOut], budgets: Sequence[float]) -> list[Row]:
    """The rules at each budget, and one threshold for all."""
    found = []
    for place, budget in enumerate(budgets):
        for rule in calls[0].rules:
            found.append(Row.of(budget, rule, calls, [call.rules[rule][place] for call in calls]))
        target = statistics.mean(call.rules["calibrated"][place].error for call in calls)
        if target > 0:  # or all sites were left dense
            same = one_threshold([call.grid for call in calls], target)
            found.append(Row.of(budget, "one threshold, same mean error", calls, same))
    return found


def one_threshold(curves: Sequence[Sequence[Measurement]], target: float) -> list[Measurement]:
    """Each call at the threshold for all that has a mean error, interpolated on the grid from dense attention on."""
    points = [[DENSE, *curve] for curve in curves]
    means = [statistics.mean(point.error for point in each) for each in zip(*points, strict=True)]
    high = min(bisect.bisect(means, target), len(GRID))
    share = (target - means[high - 1]) / (means[high] - means[high - 1])
    return [_between(curve[high - 1], curve[high], share) for curve in points]


def _between(low: Measurement, high: Measurement, share: float) -> Measurement:
    pairs = zip(dataclasses.astuple(low), dataclasses.astuple(high), strict=True)
    return Measurement(*(start + share * (end - start) for start, end in pairs))


def table(found: Sequence[Row]) -> Table:
    """One line a budget and rule."""
    shown = Table("budget", "rule", "median error / budget", "worst", "at", "kept", f"within {WITHIN:g}", "density")
    for row in found:
        shown.add_row(
            f"{row.budget:g}",
            row.rule,
            f"{row.median:.3g}",
            f"{row.worst:.3g}",
            row.worst_at,
            f"{row.kept:.0%}",
            f"{row.within:.0%}",
            f"{row.density:.3f}",
        )
    return shown


def main(
    budget: Annotated[
        list[float] | None, typer.Option(help="An error budget; repeatable, by default 1e-3, 3e-3 and 1e-2.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 4096,
    held_out_length: Annotated[int | None, typer.Option(help="Tokens of the other texts; as many by default.")] = None,
    texts: Annotated[int, typer.Option(min=0, help="How many other texts of the document's kind.")] = 2,
    other: Annotated[list[Path] | None, typer.Option(help="Another text, a file that is measured on alone.")] = None,
    model: Annotated[str | None, typer.Option(help="A transformers model; SmolLM2-135M by default.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Calibrate a model on one text and measure its errors on others."""
    place, budgets, others = choose_device(device), budget or [1e-3, 3e-3, 1e-2], other or []
    check_budgets(budgets)
    if texts + len(others) == 0:
        raise UsageError("--texts must be at least 1 without --other, not 0.")
    held_out_length = held_out_length or length
    check_document(document, min(length, held_out_length))
    for path in others:
        check_document(path, held_out_length)
    loaded, tokenizer = load_model(model, place, choose_dtype("auto", place))
    pieces = read_texts(document)
    seen = build_document(tokenizer, pieces, length)
    sources = [pieces] * texts + [read_texts(path) for path in others]
    unseen = [build_document(tokenizer, source, held_out_length, seed) for seed, source in enumerate(sources, 1)]
    calibrations = calibrate_each(loaded, prefill_inputs(seen, place), budgets)
    calls = measure_texts(loaded, [prefill_inputs(text, place) for text in unseen], calibrations, budgets)
    found = rows(calls, budgets)
    if as_json:
        settings = {
            "model": model_name(loaded, model), "length": length, "held_out_length": held_out_length, "texts": texts,
            "other": list(map(str, others)),
        }  # fmt: skip
        details = [dataclasses.asdict(call) for call in calls]
        rules = list(map(dataclasses.asdict, found))
        print(as_text(record("calibration", rules, ("budget", "rule"), MEASURES, place, settings, calls=details)))
    else:
        wide_console().print(table(found))


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse what is no error budget, or what is none any more with the margin of a calibration on top."""
    for one in budgets:
        if not 0 < one < MARGIN:
            raise UsageError(f"--budget must be above 0 and below {MARGIN}, not {one}.")


def calibrate_each(model: Any, inputs: dict[str, Any], budgets: Sequence[float]) -> dict[str, list[Calibration]]:
    """Calibrations at each budget: as `calibrate` does, and without its margin for other texts."""
    return {
        rule: [calibrate(model, inputs, error_budget=budget / margin, output=None) for budget in budgets]
        for rule, margin in (("calibrated", 1.0), ("calibrated to the whole budget", MARGIN))
    }


if __name__ == "__main__":
    run(main)
