"""The rows as a table and as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from rich.table import Table

from ..results import record
from .row import Case, Row

MEASURES: dict[str, tuple[str, str | None]] = {
    "seconds": ("s", "spread"),
    "speedup": ("times as fast as one rank", "spread"),
    "attention": ("s", "spread"),
    "exposed": ("s", None),
    "gather": ("s", "spread"),
    "hidden": ("s", None),
    "balance": ("slowest rank over the mean", None),
    "visited": ("most over the mean", None),
    "received": ("GiB", None),
    "mebibytes": ("MiB", None),
    "difference": ("relative squared difference", None),
    "density": ("share", None),
}
_COLUMNS = {
    "seconds": ("ms", ",.2f"),
    "speedup": ("x 1 rank", ".2f"),
    "attention": ("attention, ms", ",.2f"),
    "exposed": ("exposed, ms", ",.2f"),
    "gather": ("gather, ms", ",.2f"),
    "hidden": ("hidden, ms", ",.2f"),
    "balance": ("balance", ".2f"),
    "visited": ("visited", ".2f"),
    "mebibytes": ("MiB", ",.0f"),
    "difference": ("difference", ".1e"),
}
"""The headers and formats of what a table shows; times are in milliseconds there."""
_TIMES = ("seconds", "attention", "exposed", "gather", "hidden")


def table(rows: Sequence[Row]) -> Table:
    """A row for each number of ranks and layout."""
    shown = Table(title="One sequence over several ranks", title_justify="left", caption_justify="left")
    for column in ("subject", "positions", "ranks", "layout"):
        shown.add_column(column)
    for column, _ in _COLUMNS.values():
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row.subject, f"{row.length:,}", str(row.ranks), row.layout, *(_cell(row, name) for name in _COLUMNS)
        )
    shown.caption = "\n".join(
        f"{row.subject}, {row.length:,}, {row.ranks} ranks: {row.reason}" for row in rows if row.reason
    )
    return shown


def _cell(row: Row, name: str) -> str:
    value = getattr(row, name)
    return "" if value is None else format(value * 1e3 if name in _TIMES else value, _COLUMNS[name][1])


def as_dict(case: Case, rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as a result."""
    settings = {
        "shape": case.shape, "layers": case.layers, "dtype": str(case.dtype).removeprefix("torch."),
        "density": case.density, "s2o": case.config.to_dict(), "repetitions": case.repetitions,
    }  # fmt: skip
    key = ("subject", "length", "ranks", "layout")
    return record("distributed", list(map(asdict, rows)), key, MEASURES, torch.device(case.device), settings)
