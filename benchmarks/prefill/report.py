"""The rows as a table and as plain data."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from ..results import record
from .measure import Row
from .models import Subject

MEASURES: dict[str, tuple[str, str | None]] = {
    "seconds": ("s", "spread"),
    "to_eager": ("times as fast as eager", "spread"),
    "attention": ("share of the GPU's time", None),
    "attention_seconds": ("s", None),
    "mebibytes": ("MiB", None),
    "compile_seconds": ("s", None),
    "density": ("share", None),
}
COLUMNS = {
    "seconds": ("ms", ",.1f"),
    "spread": ("spread", ".0%"),
    "to_eager": ("x eager", ".2f"),
    "compile_seconds": ("compile, s", ".1f"),
    "mebibytes": ("MiB", ",.0f"),
    "attention": ("attention", ".0%"),
    "attention_seconds": ("its ms", ",.1f"),
    "density": ("density", ".3f"),
    "threshold": ("threshold", ".1e"),
}
"""The headers and formats of what is measured; times are in milliseconds in tables."""


def describe(
    subject: Subject, density: float | None, cudnn: bool = False, dynamic: bool = False, yarn: float | None = None
) -> str:
    """What a reader must know of the model, its budget, the backend of SDPA, and how it is compiled."""
    further = "; SDPA prefers cuDNN" * cudnn + "; compiled once for all lengths" * dynamic
    further += f"; YaRN {yarn:g}" if yarn else ""
    if density is None:
        return f"{subject.name}: real text, the threshold as set{further}."
    inputs = "random tokens, so attention has no structure" if subject.is_random else "real text"
    return f"{subject.name}: {inputs}; at each length the threshold is chosen to visit about {density:g}{further}."


def table(rows: list[Row], note: str, positions: int) -> Table:
    """All lengths and calls, a row for each backend; `positions` is the longest text that the model was made for."""
    shown = Table(title=f"Prefill. {note}", title_justify="left", caption_justify="left")
    for column in ("tokens", "call", "backend"):
        shown.add_column(column)
    for column, _ in COLUMNS.values():
        shown.add_column(column, justify="right")
    shown.add_column("attention sites")
    for row in rows:
        shown.add_row(f"{row.length:,}", row.call, row.backend, *cells(row), row.sites)
    notes = [f"{row.length:,} tokens, {row.call}, {row.backend}: {row.reason}" for row in rows if row.reason]
    if any(row.length > positions for row in rows):
        notes.append(f"The model was made for {positions:,} positions: beyond, its times hold but not its attention.")
    shown.caption = "\n".join(notes)
    return shown


def cells(row: Row) -> list[str]:
    """What was measured, as text; empty where it was not."""
    values = {name: getattr(row, name) for name in COLUMNS}
    for name in ("seconds", "attention_seconds"):
        if values[name] is not None:
            values[name] *= 1e3
    return ["" if value is None else format(value, COLUMNS[name][1]) for name, value in values.items()]


def as_dict(subject: Subject, rows: list[Row], note: str, repetitions: int) -> dict[str, Any]:
    """The rows as a result."""
    dtype = str(subject.model.dtype).removeprefix("torch.")
    settings = {"model": subject.name, "note": note, "dtype": dtype, "repetitions": repetitions}
    return record(
        "prefill", list(map(asdict, rows)), ("length", "call", "backend"), MEASURES, subject.model.device, settings
    )
