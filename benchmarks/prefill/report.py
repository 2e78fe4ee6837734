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
    "speedup": ("times the fastest dense", "spread"),
    "attention": ("share of the GPU's time", None),
    "mebibytes": ("MiB", None),
    "density": ("share", None),
}


def describe(subject: Subject, density: float | None) -> str:
    """What a reader must know of the model and its budget."""
    if density is None:
        return f"{subject.name}: real text, the threshold as set."
    inputs = "random tokens, so attention has no structure" if subject.is_random else "real text"
    return f"{subject.name}: {inputs}; at each length the threshold is chosen to visit about {density:g}."


def table(rows: list[Row], note: str, positions: int) -> Table:
    """All lengths, two rows each; `positions` is the longest text that the model was made for."""
    shown = Table(title=f"Prefill. {note}", title_justify="left", caption_justify="left")
    for column in (
        "tokens",
        "backend",
        "first token, s",
        "spread",
        "speed",
        "attention",
        "density",
        "MiB",
        "threshold",
    ):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(f"{row.length:,}", row.backend, *cells(row))
    notes = [f"{row.length:,} tokens, {row.backend}: {row.reason}" for row in rows if row.reason]
    if any(row.length > positions for row in rows):
        notes.append(f"The model was made for {positions:,} positions: beyond, its times hold but not its attention.")
    shown.caption = "\n".join(notes)
    return shown


def cells(row: Row) -> list[str]:
    """What was measured, as text; empty where it was not."""
    formats = {
        "seconds": ".3f", "spread": ".0%", "speedup": ".2f", "attention": ".0%", "density": ".3f", "mebibytes": ",.0f",
        "threshold": ".1e",
    }  # fmt: skip
    values = {name: getattr(row, name) for name in formats}
    return ["" if value is None else format(value, formats[name]) for name, value in values.items()]


def as_dict(subject: Subject, rows: list[Row], note: str, repetitions: int) -> dict[str, Any]:
    """The rows as a result."""
    dtype = str(subject.model.dtype).removeprefix("torch.")
    settings = {"model": subject.name, "note": note, "dtype": dtype, "repetitions": repetitions}
    return record("prefill", list(map(asdict, rows)), ("length", "backend"), MEASURES, subject.model.device, settings)
