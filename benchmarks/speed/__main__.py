"""The operator beside dense attention, call by call, on the shapes of well-known models.

    python -m benchmarks.speed --length 8192 --density 0.12 --length 131072 --density 0.05 --s2o default --s2o packed

Queries and keys are random, and made for each setting such that it visits the density asked for (`benchmarks/inputs.py`
says how); density and error are those of the outputs timed. Times are medians of repetitions in which the contenders
take turns; on a GPU between events around one call, the cache cold.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig
from s2o_compile.testbed.model import choose_device, choose_dtype
from s2o_compile.testbed.options import Device, DType, Json, check_names, make_folder, read_config

from ..command import by_device, progress_bars, run, wide_console
from ..results import as_text
from ..results import save as save_result
from .contenders import DENSE, PRESETS
from .measure import Case, Row, measure
from .report import as_dict, save_plot, table
from .shapes import SHAPES

LENGTHS = {"cpu": (2048, 4096, 8192), "cuda": (2048, 8192, 32768, 131072)}
SHAPE = {"cpu": "smollm2", "cuda": "llama-3.1-8b"}
DENSITY = 0.1


def main(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(SHAPES)}; repeatable, by default {SHAPE['cpu']} on a CPU and {SHAPE['cuda']} on a GPU."
        ),
    ] = None,
    length: Annotated[list[int] | None, typer.Option(min=64, help=f"Positions; {by_device(LENGTHS)}")] = None,
    density: Annotated[
        list[float] | None, typer.Option(help=f"Share to visit, one or one a length; {DENSITY} by default.")
    ] = None,
    s2o: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{', '.join(PRESETS)}, or fields of S2OConfig or Ranking, NAME=VALUE ...; repeatable; by default "
            "each of the named."
        ),
    ] = None,
    dense: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(DENSE)} or none; repeatable, by default flash on a CPU and all on a GPU."),
    ] = None,
    dense_up_to: Annotated[int, typer.Option(min=0, help="Positions up to which dense attention runs.")] = 262_144,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 5,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for speed.json and speed.png.")] = None,
    as_json: Json = False,
) -> None:
    """Time sparse and dense attention side by side."""
    place = choose_device(device)
    cases = choose(shape, length, density, s2o, dense, dense_up_to, place, choose_dtype(dtype, place))
    if output:
        make_folder(output)
    rows: list[Row] = []
    for case in cases:
        own = watched(case, repetitions)
        rows += own
        if not as_json:
            wide_console().print(table(case, own))
        if output:
            save(case, rows, repetitions, output)
    if as_json:
        print(as_text(as_dict(cases[0], rows, repetitions)))


def watched(case: Case, repetitions: int) -> list[Row]:
    """The rows of a case, with the steps to them shown."""
    with progress_bars() as progress:
        task = progress.add_task("", total=None)
        return measure(
            case,
            repetitions,
            lambda step: progress.update(task, description=f"{case.shape}, {case.length:,} positions: {step}"),
        )


def choose(
    shapes: list[str] | None,
    lengths: list[int] | None,
    densities: list[float] | None,
    settings: list[str] | None,
    dense: list[str] | None,
    dense_up_to: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Case]:
    """The cases asked for, shape by shape.

    Raises:
        UsageError: A name is unknown, or a density or a setting cannot be used.
    """
    lengths = lengths or list(LENGTHS[device.type])
    densities = densities or [DENSITY]
    if len(densities) not in (1, len(lengths)) or not all(0 < one < 1 for one in densities):
        raise UsageError(f"--density must be given once, or once a length, between 0 and 1, not as {densities}.")
    configs = {text: read_setting(text) for text in settings or PRESETS}
    dense = dense or (["flash"] if device.type == "cpu" else list(DENSE))
    shapes = shapes or [SHAPE[device.type]]
    check_names("--dense", dense, (*DENSE, "none"))
    check_names("--shape", shapes, SHAPES)
    contenders = tuple(name for name in dense if name != "none")
    return [
        Case(
            name,
            length,
            densities[place % len(densities)],
            configs,
            contenders,
            dense_up_to,
            device,
            dtype,
        )
        for name in shapes
        for place, length in enumerate(lengths)
    ]


def read_setting(text: str) -> S2OConfig:
    """The settings of a preset, or of a text of fields, NAME=VALUE each.

    Raises:
        UsageError: It is neither, or a field has a value that is not allowed.
    """
    fields = PRESETS.get(text, text).split()
    if not all("=" in field for field in fields):
        known = ", ".join(map(repr, PRESETS))
        raise UsageError(f"--s2o must be one of {known}, or fields as NAME=VALUE, not {text!r}.")
    return read_config(None, 0, fields)


def save(case: Case, rows: list[Row], repetitions: int, folder: Path) -> None:
    """Write speed.json and speed.png."""
    save_result(as_dict(case, rows, repetitions), folder / "speed.json")
    save_plot(rows, folder / "speed.png")


if __name__ == "__main__":
    run(main)
