"""Error against work of sparse attention, on captured layers, over every row.

    python -m benchmarks.frontier captures/layer04.safetensors captures/layer20.safetensors --target 0.005

Each method is swept over its own dial. Work is the density plus the ranking's FLOPs as a share of dense attention's.
`--s2o` adds settings of the operator, for example --s2o "pool=4 rule=means" --threshold 1e-3 --threshold 1e-4.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from s2o_compile._console import UsageError
from s2o_compile.testbed.model import choose_device
from s2o_compile.testbed.options import Device, Json, check_names, make_folder, read_config

from .captured import Layer, load_layer
from .command import progress_bars, run
from .frontier_report import AXES, Point, as_dict, equal_error, points_table, save_plot, targets_table
from .judge import STRIP, Judge
from .methods import METHODS, Method, operator
from .results import as_text
from .results import save as save_result

THRESHOLDS = (1e-5, 1e-4, 1e-3, 1e-2)


def measure(layer: Layer, methods: dict[str, Method], every: int, progress: Progress) -> list[Point]:
    """The points of all methods on one layer."""
    task = progress.add_task(f"{layer.name}, dense", total=len(methods))
    judge = Judge(layer, every)
    points = []
    for name, method in methods.items():
        progress.update(task, description=f"{layer.name}, {name}")
        scores = method.scores(judge, method.settings)
        points += [
            Point(layer.name, name, method.dial, setting, setting == method.default, score)
            for setting, score in zip(method.settings, scores, strict=True)
        ]
        progress.advance(task)
    return points


def choose(names: list[str] | None, variants: list[str], thresholds: list[float] | None) -> dict[str, Method]:
    """The methods asked for.

    Raises:
        UsageError: A name is none of `METHODS`, or a variant's option or threshold cannot be used.
    """
    check_names("--method", names or (), METHODS)
    chosen = {name: METHODS[name] for name in METHODS if not names or name in names}
    dial = tuple(thresholds or THRESHOLDS)
    return chosen | {f"s2o, {text}": _variant(text, dial) for text in variants}


def _variant(text: str, dial: tuple[float, ...]) -> Method:
    """The operator with the options of a text, NAME=VALUE each, at thresholds that it allows."""
    configs = [read_config(threshold, 0, text.split(), "--s2o") for threshold in dial]
    return operator(configs[0], dial)


def main(
    captures: Annotated[list[Path], typer.Argument(help="Files that python -m benchmarks.capture wrote.")],
    method: Annotated[
        list[str] | None, typer.Option(help=f"One of {'; '.join(METHODS)}. Repeatable, all by default.")
    ] = None,
    s2o: Annotated[
        list[str] | None, typer.Option(help="Fields of S2OConfig or Ranking, NAME=VALUE ...; repeatable.")
    ] = None,
    threshold: Annotated[list[float] | None, typer.Option(help="Of the --s2o settings; repeatable.")] = None,
    target: Annotated[
        list[float] | None, typer.Option(help="Error to compare work at, one or one a file; 0.005 by default.")
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="Judge one strip of 128 rows in EVERY.")] = 1,
    length: Annotated[int | None, typer.Option(min=1, help="Take only the first positions.")] = None,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for frontier.json and the plots.")] = None,
    as_json: Json = False,
) -> None:
    """Compare the error of sparse attention against its work on captured layers."""
    methods = choose(method, s2o or [], threshold)
    targets = _targets(target or [0.005], captures)
    if output:
        make_folder(output)
    rows = "every row" if every == 1 else f"SAMPLED: one strip of {STRIP} rows in {every}"
    place = choose_device(device)
    points: list[Point] = []
    with progress_bars() as progress:
        for path in captures:
            layer = load_layer(path, place).first(length or 2**62)
            points += measure(layer, methods, every, progress)
            if output:
                save(points, targets, rows, place, output)
    reached = equal_error(points, targets)
    if as_json:
        print(as_text(as_dict(points, reached, rows, place)))
        return
    for _, own in itertools.groupby(points, lambda point: point.layer):
        Console().print(points_table(list(own), rows))
    Console().print(targets_table(reached, rows))


def save(points: list[Point], targets: dict[str, float], rows: str, device: torch.device, folder: Path) -> None:
    """Write frontier.json, and the plots against work and against density."""
    save_result(as_dict(points, equal_error(points, targets), rows, device), folder / "frontier.json")
    for against in AXES:
        save_plot(points, against, rows, folder / f"frontier-{against}.png")


def _targets(errors: list[float], captures: list[Path]) -> dict[str, float]:
    """The error to compare work at, by layer."""
    if len({path.stem for path in captures}) < len(captures):
        raise UsageError("Captures are told apart by their file names, of which two are the same: rename one.")
    if len(errors) not in (1, len(captures)) or min(errors) <= 0:
        raise UsageError(f"--target must be given once, or once a capture, above 0, not as {errors}.")
    return {path.stem: errors[place % len(errors)] for place, path in enumerate(captures)}


if __name__ == "__main__":
    run(main)
