"""What was measured on a device: as a table, and as the file that the operator reads."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .._console import as_text
from ..ops import tuned
from ..ops.break_even import BreakEven, shipped
from ..ops.devices import name_of
from ..version import VERSION
from ..writing import write_text
from .fit import fit
from .measure import Row

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Tuned:
    """What was measured and what follows; print it, or take `to_dict`.

    Attributes:
        device: What it was measured on.
        dtype: Of query, key and value.
        rows: The calls.
    """

    device: torch.device
    dtype: torch.dtype
    rows: Sequence[Row]

    @property
    def shipped(self) -> BreakEven:
        """What holds for devices of this kind without a measurement."""
        return shipped(self.device, self.dtype)

    @property
    def found(self) -> BreakEven:
        """What fits the calls best."""
        return BreakEven(*fit(self.rows, self.shipped), source="measured now")

    def to_dict(self) -> dict[str, Any]:
        """The contents of the file."""
        return dict(json.loads(self._text()))

    def save(self, path: Path) -> None:
        """Write the file, in a folder that is made where it is missing.

        Raises:
            WriteError: It cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, self._text())

    def _text(self) -> str:
        found = self.found
        return tuned.as_text(
            name_of(self.device),
            found.work,
            found.keys,
            date=datetime.date.today().isoformat(),
            versions={"s2o-compile": VERSION, "torch": torch.__version__},
            dtype=str(self.dtype).removeprefix("torch."),
            threads=torch.get_num_threads() if self.device.type == "cpu" else None,
            rows=list(map(_as_dict, self.rows)),
        )

    @property
    def summary(self) -> str:
        """One sentence on what follows."""
        found, before = self.found, self.shipped
        if found.is_never:
            return f"On {name_of(self.device)} no call gained: all run dense by default."
        return (
            f"On {name_of(self.device)} sparse attention pays from {_limits(found)} on ({_limits(before)} as shipped)."
        )

    def __rich__(self) -> Table:
        from rich.table import Table

        found = self.found
        title = "Sparse and dense attention: heads/KV heads/channels, positions"
        table = Table(title=title, box=None, padding=(0, 2, 0, 0))
        table.add_column("call", no_wrap=True)
        for column in ("work", "keys", "dense, ms", "sparse, ms", "ratio"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("dense by", overflow="fold")
        table.add_column("now", no_wrap=True)
        for row in self.rows:
            work = row.case.work
            is_sparse = work.multiply_adds >= found.work and work.keys >= found.keys
            times = [_shown(1e3 * x if x else None, ",.2f") for x in (row.dense, row.sparse)]
            amounts = [f"{work.multiply_adds:.1e}", f"{work.keys:,.0f}"]
            cells = [
                *amounts,
                *times,
                _shown(row.ratio, ".2f"),
                row.reason or row.by,
                "sparse" if is_sparse else "dense",
            ]
            table.add_row(str(row.case), *cells)
        return table

    def __str__(self) -> str:
        return as_text(self)


def _as_dict(row: Row) -> dict[str, Any]:
    work = row.case.work
    amounts = {"multiply_adds": work.multiply_adds, "keys_a_query": work.keys}
    times = {"dense": row.dense, "dense_by": row.by, "sparse": row.sparse, "ratio": row.ratio, "reason": row.reason}
    return {**dataclasses.asdict(row.case), **amounts, **times}


def _limits(limits: BreakEven) -> str:
    if limits.is_never:
        return "no length"
    return f"{limits.keys:,.0f} keys a query and {limits.work:.1e} multiply-adds a call"


def _shown(number: float | None, form: str) -> str:
    return "-" if number is None or math.isnan(number) else format(number, form)
