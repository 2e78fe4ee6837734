"""``s2o tune``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._console import UsageError
from ..testbed.options import Device, DType, Json, check_file, make_folder

if TYPE_CHECKING:
    import torch

SECONDS = {"cuda": 110.0, "cpu": 300.0}
QUICK_SECONDS = {"cuda": 60.0, "cpu": 60.0}


def tune(
    device: Device = "auto",
    dtype: DType = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Time fewer calls, in a minute at most.")] = False,
    sweep: Annotated[
        bool,
        typer.Option(
            "--sweep",
            help="Time shapes of many models, batches of 1 and 4, windows, and 2,048 to 131,072 positions, without an "
            "end unless --seconds sets one; the four options below choose others.",
        ),
    ] = False,
    shape: Annotated[
        list[str] | None, typer.Option(help="Of a sweep: query heads/KV heads/channels, such as 32/8/128; repeatable.")
    ] = None,
    length: Annotated[list[int] | None, typer.Option(min=64, help="Of a sweep: positions; repeatable.")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Of a sweep: sequences; repeatable.")] = None,
    window: Annotated[
        list[int] | None, typer.Option(min=0, help="Of a sweep: keys that a query sees, 0 for all; repeatable.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1, help="When to stop; by default after 110 on a GPU and 300 on a CPU, or 60 with --quick."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Write another file than the one that is read here, call by call; nothing changes then."),
    ] = None,
    json_only: Json = False,
) -> None:
    """Measure from how much work on sparse attention pays on this device, and choose by that from now on.

    Times made-up calls, sparse and dense, and writes two limits into a small file: the least work of a call
    (multiply-adds of dense attention) and the fewest keys that a query sees, on average. They hold for calls in
    float32, or for those in half precision, as --dtype says. Processes that start later read the file from
    ~/.cache/s2o-compile, or the folder that the environment variable S2O_TUNED names; S2O_TUNED=0 ignores it, and
    deleting it undoes this. s2o doctor shows the limits in use. Let nothing else run meanwhile.
    """
    from rich.console import Console

    from .._console import Progress
    from ..testbed.model import choose_device, choose_dtype
    from ..tuning.cases import read_shape, usual_cases
    from ..tuning.cases import sweep as sweep_cases
    from ..tuning.run import measure_all

    if not sweep and any(given is not None for given in (shape, length, batch, window)):
        raise UsageError("--shape, --length, --batch and --window choose the calls of --sweep: add it.")
    place = choose_device(device)
    precision = choose_dtype(dtype, place)
    if sweep:
        windows = [size or None for size in window or []]
        cases = sweep_cases(list(map(read_shape, shape or [])), length or [], batch or [], windows)
    else:
        cases = usual_cases(place, quick)
    path = output or _own_file(place, precision)
    make_folder(path.parent)
    check_file(path)
    limit = seconds or (math.inf if sweep else (QUICK_SECONDS if quick else SECONDS)[place.type])
    found = measure_all(cases, place, precision, limit, Progress(), output)
    if all(row.ratio is None for row in found.rows):
        raise UsageError(f"No call was timed: {found.rows[0].reason if found.rows else 'there was no time'}.")
    found.save(path)
    if json_only:
        print(json.dumps(found.to_dict(), indent=2))
        return
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(found)
    print(f"{found.summary}\nSaved {path}.")


def _own_file(device: torch.device, dtype: torch.dtype) -> Path:
    """The file that is read for a device and a dtype.

    Raises:
        UsageError: Files are ignored.
    """
    from ..ops.devices import name_of
    from ..ops.tuned import path_of

    path = path_of(name_of(device), dtype)
    if path is None:
        raise UsageError("S2O_TUNED=0 ignores what is measured: unset it, or choose a file with --output.")
    return path
