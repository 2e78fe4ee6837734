"""The rows as tables and as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..results import record
from .row import REPLAY, Case, Row

MEASURES: dict[str, tuple[str, str | None]] = {
    "seconds": ("s", "spread"),
    "gain": ("times as fast as dense", "spread"),
    "of_alone": ("gain over that of the model alone", "spread"),
    "to_contiguous": ("time over that with contiguous keys", "spread"),
    "step": ("s", "step_spread"),
    "to_stock": ("step over that of transformers' own attention", "step_spread"),
}
_TIME = {
    "seconds": ("ms", ",.2f"),
    "spread": ("spread", ".1%"),
    "sparse": ("sparse calls", "d"),
    "gain": ("x dense", ".2f"),
}
_MODEL = _TIME | {
    "of_alone": ("of alone", ".2f"),
    "step": ("step, ms", ",.2f"),
    "step_spread": ("spread", ".1%"),
    "to_stock": ("to stock", ".3f"),
}
_REPLAY = _TIME | {"to_contiguous": ("to contiguous", ".3f")}
"""The headers and formats of what a table shows; times are in milliseconds there."""
_SECONDS = ("seconds", "step")


def tables(rows: Sequence[Row]) -> list[Table]:
    """One of prompts in the engine and of the model alone, and one of replays; those that have rows."""
    parts = (
        ("Time to the first token", "runs", _MODEL, [row for row in rows if row.subject != REPLAY]),
        ("One call of attention", "keys", _REPLAY, [row for row in rows if row.subject == REPLAY]),
    )
    return [_table(*part) for part in parts if part[-1]]


def _table(title: str, keys: str, columns: Mapping[str, tuple[str, str]], rows: Sequence[Row]) -> Table:
    shown = Table(title=title, title_justify="left", caption_justify="left")
    for column in ("tokens", "subject", "attention", keys):
        shown.add_column(column)
    for column, _ in columns.values():
        shown.add_column(column, justify="right")
    for row in rows:
        cells = (_cell(row, name, form) for name, (_, form) in columns.items())
        shown.add_row(f"{row.length:,}", row.subject, row.way, row.keys, *cells)
    shown.caption = "\n".join(
        f"{row.length:,}, {row.subject}, {row.way} {row.keys}: {row.reason}" for row in rows if row.reason
    )
    return shown


def _cell(row: Row, name: str, form: str) -> str:
    value = getattr(row, name)
    return "" if value is None else format(value * 1e3 if name in _SECONDS else value, form)


def as_dict(case: Case, rows: Sequence[Row], **settings: Any) -> dict[str, Any]:
    """The rows as a result; `settings` are more that was chosen."""
    chosen = {
        "dtype": str(case.dtype).removeprefix("torch."), "density": case.density, "s2o": case.config.to_dict(),
        "neighbours": case.neighbours, "context": case.context, "budget": case.budget, "page": case.page,
        "repetitions": case.repetitions,
    }  # fmt: skip
    key = ("subject", "length", "way", "keys")
    return record("serving", list(map(asdict, rows)), key, MEASURES, case.device, chosen | settings)
