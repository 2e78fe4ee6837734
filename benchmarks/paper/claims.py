"""What the paper claims, and rows that stand beside it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from s2o_compile.ops import S2OConfig

from ..results import record

ERROR, DENSITY, ATTENTION, PREFILL = CLAIMS = ("error", "density", "attention", "prefill")
CLAIMED = {ERROR: 3.82, DENSITY: 3.31, ATTENTION: 7.51, PREFILL: 3.81}
"""Times the baseline's, as the abstract has them."""
TITLES = {
    ERROR: "error at equal density: PBS-Attn's over S2O's",
    DENSITY: "density at equal error: PBS-Attn's over S2O's",
    ATTENTION: "time of attention: FlashAttention-2's over S2O's",
    PREFILL: "time of a prefill: with FlashAttention-2 over with S2O",
}
SETTINGS = {"published rule": S2OConfig.paper(), "fastest": S2OConfig.fast(), "lookups kept": S2OConfig()}
"""Settings of the operator; `S2OConfig()` is the one that keeps lookups (`s2o bench quality`)."""
MEASURES: dict[str, tuple[str, str | None]] = {
    "ratio": ("times", None),
    "density": ("share", None),
    "error": ("relative squared error", None),
    "work": ("share of dense FLOPs", None),
    "seconds": ("s", None),
}


FORMS = {"density": ".3f", "error": ".1e", "work": ".3f", "seconds": ".3f"}
"""How the table shows the figures beside a ratio."""


@dataclass(frozen=True)
class Row:
    """One claim with one setting.

    Attributes:
        claim: One of `CLAIMS`.
        subject: The layer or the model it was measured on, with its length.
        settings: A name in `SETTINGS`.
        ratio: The baseline's over ours; None where it could not be measured.
        bound: ">" where the ratio is at least that, as the sweep ended; "" else.
        density: What the setting visits where the ratio was taken, over what a dense kernel visits.
        error: Its relative squared error there; None where it was not judged.
        work: Its density and ranking there, as a share of dense attention's FLOPs; None where it was not counted.
        seconds: Of the setting, of claims about time.
        reason: Why there is no ratio.
    """

    claim: str
    subject: str
    settings: str
    ratio: float | None = None
    bound: str = ""
    density: float | None = None
    error: float | None = None
    work: float | None = None
    seconds: float | None = None
    reason: str = ""


def table(rows: list[Row]) -> Table:
    """The claims one after the other."""
    shown = Table(
        title="The paper's claims, and what was measured", title_justify="left", box=None, padding=(0, 2, 0, 0)
    )
    for name in ("claim", "on", "settings"):
        shown.add_column(name)
    for name in ("claimed", "measured", *FORMS):
        shown.add_column(name, justify="right", no_wrap=True)
    last = ""
    for row in rows:
        claim, last = ("" if row.claim == last else TITLES[row.claim]), row.claim
        measured = row.reason if row.ratio is None else f"{row.bound}{row.ratio:.2f}x"
        figures = (_text(getattr(row, name), form) for name, form in FORMS.items())
        shown.add_row(claim, row.subject, row.settings, f"{CLAIMED[row.claim]:.2f}x", measured, *figures)
    return shown


def _text(figure: float | None, form: str) -> str:
    return "" if figure is None else f"{figure:{form}}"


def as_dict(rows: list[Row], device: torch.device, settings: dict[str, Any]) -> dict[str, Any]:
    """Everything as a result."""
    found = [asdict(row) | {"claimed": CLAIMED[row.claim]} for row in rows]
    chosen = {name: config.to_dict() for name, config in SETTINGS.items()}
    return record("paper", found, ("claim", "subject", "settings"), MEASURES, device, settings | {"s2o": chosen})
