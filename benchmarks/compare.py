"""Two results of a benchmark side by side: what moved beyond the noise, and what is only in one of them.

s2o bench compare old/speed.json new/speed.json
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from s2o_compile._console import UsageError
from s2o_compile.testbed.options import Json

from .command import run, wide_console
from .results import FACTS, describe, load, row_key

NOISE = 0.01
"""Relative change that counts as noise where no spread was measured."""
Figures = dict[tuple[str, str], tuple[float, float | None]]
"""A value and its spread, by the description of a row and the name of a measure."""


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure that moved: its change relative to the old value (None from zero), and the noise that it exceeds."""

    row: str
    measure: str
    unit: str
    old: float
    new: float
    change: float | None
    noise: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two results compared.

    Attributes:
        facts: Old and new, of each fact in which the results differ; parts of nested ones by their path.
        moved: The figures that moved beyond the noise.
        within: How many did not.
        only_old: Row and measure of the figures that only the old result has.
        only_new: The same of the new one.
    """

    facts: dict[str, tuple[Any, Any]]
    moved: list[Change]
    within: int
    only_old: list[tuple[str, str]]
    only_new: list[tuple[str, str]]


def compare(old: Mapping[str, Any], new: Mapping[str, Any], noise: float = NOISE) -> Comparison:
    """Compare two results.

    A figure moved when it changed by more than the larger of its two spreads, or than `noise` where it has none.
    """
    before, after = figures(old), figures(new)
    both = [place for place in before if place in after]
    moved = [
        change for place in both if (change := _change(place, old, before[place], after[place], noise)) is not None
    ]
    return Comparison(
        facts=dict(pair for name in FACTS for pair in differences(name, old[name], new[name])),
        moved=moved,
        within=len(both) - len(moved),
        only_old=[place for place in before if place not in after],
        only_new=[place for place in after if place not in before],
    )


def differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The parts in which two facts differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for part in {**old, **new}:
            yield from differences(f"{name}.{part}", old.get(part), new.get(part))
    elif old != new:
        yield name, (old, new)


def figures(result: Mapping[str, Any]) -> Figures:
    """All that was measured; fields that are no numbers are left out."""
    found: Figures = {}
    for row in result["rows"]:
        for name, measure in result["measures"].items():
            if isinstance(row.get(name), int | float):
                spread = row.get(measure.get("spread") or "")
                found[describe(row_key(result, row)), name] = row[name], spread
    return found


def _change(
    place: tuple[str, str],
    result: Mapping[str, Any],
    old: tuple[float, float | None],
    new: tuple[float, float | None],
    noise: float,
) -> Change | None:
    """What changed at one place; None where it is noise."""
    spreads = [spread for _, spread in (old, new) if spread is not None]
    allowed = max(spreads, default=noise)
    if abs(new[0] - old[0]) <= allowed * abs(old[0]):
        return None
    relative = new[0] / old[0] - 1 if old[0] else None
    return Change(*place, result["measures"][place[1]]["unit"], old[0], new[0], relative, allowed)


def table(comparison: Comparison) -> Table:
    """The figures that moved, one a line."""
    shown = Table("row", "measure", "old", "new", "change", "noise")
    for one in comparison.moved:
        relative = "from zero" if one.change is None else f"{one.change:+.1%}"
        shown.add_row(
            one.row, f"{one.measure}, {one.unit}", f"{one.old:.4g}", f"{one.new:.4g}", relative, f"{one.noise:.1%}"
        )
    return shown


def notes(comparison: Comparison) -> Iterator[str]:
    """The rest of a comparison, a line each."""
    for name, (was, now) in comparison.facts.items():
        yield f"{name}: {was} -> {now}"
    for which, places in (("old", comparison.only_old), ("new", comparison.only_new)):
        for row, measure in places:
            yield f"only in the {which} result: {row}: {measure}"
    yield f"{len(comparison.moved)} moved, {comparison.within} within the noise"


def main(
    old: Annotated[Path, typer.Argument(help="A result that a benchmark wrote.")],
    new: Annotated[Path, typer.Argument(help="Another of the same benchmark.")],
    noise: Annotated[
        float, typer.Option(min=0, help="Relative change that is noise where no spread was measured.")
    ] = NOISE,
    as_json: Json = False,
) -> None:
    """Compare two results: what moved beyond the noise, and which rows only one of them has."""
    first, second = load(old), load(new)
    if first["benchmark"] != second["benchmark"]:
        raise UsageError(f"{old} is a result of {first['benchmark']!r} and {new} of {second['benchmark']!r}.")
    comparison = compare(first, second, noise)
    if as_json:
        print(json.dumps(dataclasses.asdict(comparison), indent=2))
    else:
        console = wide_console()
        if comparison.moved:
            console.print(table(comparison))
        for line in notes(comparison):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(main)
