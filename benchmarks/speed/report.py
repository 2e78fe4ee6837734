"""The rows as tables, as plain data and as a picture."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from s2o_compile.writing import replacing

from ..results import record
from .measure import Case, Row
from .shapes import SHAPES

COLUMNS = {
    "ms": ("milliseconds", ",.2f"),
    "spread": ("spread", ".0%"),
    "x dense": ("ratio", ".2f"),
    "density": ("density", ".3f"),
    "error": ("error", ".1e"),
    "TFLOP/s": ("tflops", ".3g"),
    "ranking, ms": ("ranking", ",.2f"),
    "attention, ms": ("attention", ",.2f"),
    "host, ms": ("host", ".2f"),
    "MiB": ("mebibytes", ",.0f"),
}
"""The fields of `Row` that are shown, and how."""
MEASURES: dict[str, tuple[str, str | None]] = {
    "milliseconds": ("ms", "spread"),
    "ratio": ("times the fastest dense", "spread"),
    "density": ("share", None),
    "error": ("relative squared error", None),
    "tflops": ("TFLOP/s", "spread"),
    "ranking": ("ms", "spread"),
    "attention": ("ms", "spread"),
    "host": ("ms", "spread"),
    "mebibytes": ("MiB", None),
}
"""The measured fields of `Row`, as `benchmarks.results` has them."""
MARKERS = "os^vD<>Pp*Xd"
COLOURS = [f"C{number}" for number in range(10) if number != 7]
"""Of sparse attention: Matplotlib's without its grey."""


def table(case: Case, rows: list[Row]) -> Table:
    """All contenders of one case and the density asked for; columns that nothing was measured for are left out."""
    title = (
        f"{case.shape} ({SHAPES[case.shape]}), {case.length:,} positions, {case.precision}, density {case.density:g}"
    )
    shown = Table(title=title, title_justify="left", caption_justify="left", box=None, padding=(0, 2, 0, 0))
    shown.add_column("attention")
    measured = {
        column: (field, form)
        for column, (field, form) in COLUMNS.items()
        if any(getattr(row, field) is not None for row in rows)
    }
    for column in measured:
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(row.name, *(_cell(getattr(row, field), form) for field, form in measured.values()))
    shown.caption = "\n".join(f"{row.name}: {row.reason}" for row in rows if row.reason)
    return shown


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def as_dict(case: Case, rows: list[Row], repetitions: int) -> dict[str, Any]:
    """The rows as a result; device, dtype and settings are those of `case`."""
    settings = {
        "dtype": case.precision,
        "repetitions": repetitions,
        "s2o": {name: config.to_dict() for name, config in case.settings.items()},
        "shapes": {name: asdict(SHAPES[name]) for name in dict.fromkeys(row.shape for row in rows)},
    }
    return record("speed", list(map(asdict, rows)), ("shape", "length", "name"), MEASURES, case.device, settings)


def save_plot(rows: list[Row], path: Path) -> None:
    """Time against length, one panel a shape; dense attention is drawn in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    shapes = list(dict.fromkeys(row.shape for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    lines = sum(wrapped(name).count("\n") + 1 for name in names) / len(shapes)
    figure = Figure(figsize=(4 * len(shapes) + 0.8, 3.6 + 0.15 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        for number, name in enumerate(names):
            _draw(panel, [row for row in rows if (row.shape, row.name) == (shape, name) and row.milliseconds], number)
        lengths = sorted({row.length for row in rows if row.shape == shape})
        panel.set(xscale="log", yscale="log", title=f"{shape} ({SHAPES[shape]})", xlabel="positions")
        panel.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths], fontsize=8)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
        panel.grid(True, which="major", linewidth=0.4, alpha=0.6)
    panels[0].set_ylabel("time of a call, ms")
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2 * len(shapes), fontsize=8)
    with replacing(path) as place:
        figure.savefig(place, dpi=200)


def wrapped(name: str) -> str:
    """A name in lines that fit into half of a panel's width."""
    return textwrap.fill(name, 36, break_long_words=False)


def _draw(panel: Any, rows: list[Row], number: int) -> None:
    """The curve of one contender."""
    if not rows:
        return
    is_sparse = rows[0].asked is not None
    panel.plot(
        [row.length for row in rows],
        [row.milliseconds for row in rows],
        "-" if is_sparse else "--",
        marker=MARKERS[number % len(MARKERS)],
        color=COLOURS[number % len(COLOURS)] if is_sparse else "0.5",
        markersize=5,
        linewidth=1.2,
        label=wrapped(rows[0].name),
    )
