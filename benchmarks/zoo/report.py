"""Rows of the zoo's table, shown in a terminal, as Markdown and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from rich.table import Table

from .refusals import kind_of_refusal

MEASURES: dict[str, tuple[str, str | None]] = {
    "expected": ("sites", None),
    "found": ("sites", None),
    "difference": ("relative to the largest output", None),
}


@dataclass(frozen=True)
class Row:
    """One call of one model: attention sites, why some stayed dense, and the largest relative difference."""

    architecture: str
    family: str
    implementation: str
    scenario: str
    expected: int
    found: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    difference: float | None = None
    error: str = ""

    @property
    def rewritten(self) -> int:
        """How many sites became the operator."""
        return self.found - len(self.refused)

    @property
    def problems(self) -> list[str]:
        """What went wrong, and why sites stayed dense, each once."""
        failed = [self.error] if self.error else ["not found"] * (self.found != self.expected)
        return failed + list(dict.fromkeys(map(_kind, self.refused)))


def _kind(refusal: dict[str, str]) -> str:
    return kind_of_refusal(refusal["reason"])


def table(rows: Iterable[Row]) -> Table:
    """One line a call."""
    shown = Table("architecture", "attention", "scenario", "sites", "found", "rewritten", "difference", "dense because")
    for row in rows:
        counts = [str(count) for count in (row.expected, row.found, row.rewritten)]
        difference = "-" if row.difference is None else f"{row.difference:.1e}"
        shown.add_row(row.architecture, row.implementation, row.scenario, *counts, difference, "; ".join(row.problems))
    return shown


def totals(rows: Iterable[Row]) -> dict[str, Any]:
    """The sites of all calls together, and how many stayed dense for each kind of reason."""
    rows = list(rows)
    counts = {name: sum(getattr(row, name) for row in rows) for name in ("expected", "found", "rewritten")}
    return counts | {"refused": dict(Counter(_kind(site) for row in rows for site in row.refused).most_common())}


def markdown(rows: Iterable[Row]) -> str:
    """One line an architecture: the sites rewritten of all that its calls compute, for each way to spell attention."""
    lines = [
        "| architecture | family | sdpa | eager | largest difference | dense because |",
        "|---|---|---|---|---|---|",
    ]
    for (name, family), group in groupby(rows, lambda row: (row.architecture, row.family)):
        own = list(group)
        shares = [_share([row for row in own if row.implementation == spelling]) for spelling in ("sdpa", "eager")]
        difference = max((row.difference for row in own if row.difference is not None), default=float("nan"))
        cells = [name, family, *shares, f"{difference:.1e}", "; ".join(_problems(own))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _share(rows: list[Row]) -> str:
    expected = sum(row.expected for row in rows)
    return f"{sum(row.rewritten for row in rows)} of {expected}" if rows else "-"


def _problems(rows: list[Row]) -> list[str]:
    """The problems of an architecture's calls, with the scenarios where not all have them."""
    scenarios: dict[str, dict[str, None]] = {}
    for row in rows:
        for problem in row.problems:
            scenarios.setdefault(problem, {})[row.scenario] = None
    every = {row.scenario for row in rows}
    return [name if every == own.keys() else f"{name} ({', '.join(own)})" for name, own in scenarios.items()]
