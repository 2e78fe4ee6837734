"""Times many calls, until they are done or the time is up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .._console import Progress
from .cases import Case
from .measure import Row, measure
from .result import Tuned


def measure_all(
    cases: Sequence[Case],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float,
    progress: Progress,
    output: Path | None = None,
) -> Tuned:
    """Time calls, the cheapest first.

    Args:
        cases: The calls.
        device: Where they run.
        dtype: Of query, key and value.
        seconds: After which no other call is begun.
        progress: Shows how far it is.
        output: A file that is written anew after each call.

    Raises:
        WriteError: The file cannot be written.
    """
    rows: list[Row] = []
    end = time.monotonic() + seconds
    with progress.step("Timing calls") as update:
        for case in sorted(cases, key=lambda case: case.work.multiply_adds):
            if time.monotonic() > end:
                progress.note(f"The time is up after {len(rows)} of {len(cases)} calls.")
                break
            update(str(case), len(rows), len(cases))
            rows.append(measure(case, device, dtype))
            if output is not None:
                Tuned(device, dtype, rows).save(output)
    return Tuned(device, dtype, rows)
