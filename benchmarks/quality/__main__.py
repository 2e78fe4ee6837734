"""The command line of the quality benchmark."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig
from s2o_compile.testbed.memory import check_memory
from s2o_compile.testbed.model import check_length, choose_device, choose_dtype, load_model, model_name
from s2o_compile.testbed.options import Device, DType, Json, Model, make_folder, read_config

from ..command import progress_bars, run
from ..results import as_text
from ..results import save as save_result
from .attention import COMPARED, METHODS, Attention, operator
from .cases import Settings, build_case, count_cases
from .filler import FILLERS
from .picture import save_picture
from .report import LEGEND, as_dict, tables
from .run import Outcome, read_case
from .tasks import TASKS
from .yarn import stretch

LENGTHS = (2048, 4096)


def choose(names: list[str], variants: list[str]) -> dict[str, Attention]:
    """The methods asked for; `variants` are settings of the operator, NAME=VALUE ... each.

    Raises:
        UsageError: A name is none of `METHODS`, or a variant's option cannot be used.
    """
    _check_names("--method", names, METHODS)
    chosen = {name: METHODS[name] for name in names}
    return chosen | {f"s2o, {text}": operator(read_config(None, 0, text.split(), "--s2o")) for text in variants}


def choose_tasks(names: list[str] | None, settings: Settings) -> list[str]:
    """The tasks asked for, in the order of `TASKS`.

    Raises:
        UsageError: A task or the filler is unknown.
    """
    _check_names("--task", names or [], TASKS)
    _check_names("--filler", [settings.filler], FILLERS)
    return [task for task in TASKS if not names or task in names]


def _check_names(option: str, names: list[str], known: dict[str, Any]) -> None:
    for name in names:
        if name not in known:
            raise UsageError(f"{option} must be one of {', '.join(map(repr, known))}, not {name!r}.")


def main(
    model: Model = None,
    length: Annotated[list[int] | None, typer.Option(help="Tokens of a document; repeatable.")] = None,
    method: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(METHODS)}; repeatable.")] = None,
    s2o: Annotated[
        list[str] | None, typer.Option(help="Fields of S2OConfig or Ranking, NAME=VALUE ...; repeatable.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}; repeatable.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Documents of each task and length.")] = 1,
    depths: Annotated[int, typer.Option(min=1, help="Depths of the single needle, a document each.")] = 5,
    scored: Annotated[int, typer.Option(min=1, help="The most tokens of a document for perplexity.")] = 1024,
    filler: Annotated[str, typer.Option(help="What hides the values: text, noise or pairs.")] = "text",
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    yarn: Annotated[float | None, typer.Option(help="Stretch the model's positions by this factor.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for quality.json and quality.png.")] = None,
    as_json: Json = False,
) -> None:
    """Compare perplexity and retrieval with sparse attention against dense attention, in a real model."""
    methods = choose(method or ([] if s2o else list(COMPARED)), s2o or [])
    settings = Settings(filler, document, seed, depths, repeats, scored)
    tasks = choose_tasks(task, settings)
    lengths = sorted(set(length or LENGTHS))
    place = choose_device(device)
    if output:
        make_folder(output)
    outcomes: list[Outcome] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bars(*columns) as progress:
        bar = progress.add_task("Loading the model")
        loaded, tokenizer = load_model(model, place, choose_dtype(dtype, place))
        if yarn is not None:
            stretch(loaded, yarn)
        name = model_name(loaded, model)
        check_length(loaded, name, lengths[-1])
        chosen = describe(loaded, name, settings)
        numbers = [(size, each, n) for size in lengths for each in tasks for n in range(count_cases(each, settings))]
        layers = loaded.config.get_text_config().num_hidden_layers
        progress.update(bar, total=len(numbers) * (len(methods) + 1) * layers)
        for size, each, number in numbers:
            progress.update(bar, description=f"{size:,} tokens, {each} {number + 1}")
            case = build_case(tokenizer, each, size, number, settings)
            check_memory(loaded, case.document)
            outcomes += read_case(loaded, case, methods, lambda: progress.advance(bar))
            if output:
                save(outcomes, chosen, place, output)
    if as_json:
        print(as_text(as_dict(outcomes, chosen, place)))
        return
    for table in tables(outcomes):
        Console().print(table, "")
    Console().print(LEGEND)


def describe(model: Any, name: str, settings: Settings) -> dict[str, Any]:
    """The settings of all documents of a run."""
    weight = next(model.parameters())
    config = model.config.get_text_config()
    return {
        "model": name,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "rope": getattr(config, "rope_parameters", None),
        "s2o": S2OConfig().to_dict(),
        "documents": asdict(settings) | {"text": str(settings.text or "Python's standard library")},
    }


def save(outcomes: list[Outcome], settings: dict[str, Any], device: torch.device, folder: Path) -> None:
    """Write quality.json and the picture of needles; after each document, as a run may be cut short."""
    save_result(as_dict(outcomes, settings, device), folder / "quality.json")
    save_picture(outcomes, folder / "quality.png")


if __name__ == "__main__":
    run(main)
