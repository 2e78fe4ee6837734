"""The command line of the quality benchmark."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import LEAST_LENGTH, check_document, read_texts
from s2o_compile.testbed.document import build_document as build_development_text
from s2o_compile.testbed.memory import check_memory
from s2o_compile.testbed.model import check_length, choose_device, choose_dtype, load_model, model_name
from s2o_compile.testbed.options import Device, DType, Json, Model, check_names, make_folder, read_config

from ..baselines.kascade import DEVELOPMENT_TOKENS
from ..command import announce, progress_bars, run, wide_console
from ..prefill.backends import CUDNN_FIRST, preferring
from ..results import as_text, versions
from ..results import save as save_result
from .attention import COMPARED, DENSE, METHODS, PRESETS, Attention, Reusing, operator
from .cases import Settings, build_case
from .filler import FILLERS
from .journal import Journal, check_configuration
from .page import save_page
from .report import LEGEND, as_dict, tables
from .run import Outcome, read_case
from .tasks import TASKS
from .yarn import stretch

LENGTHS = (2048, 4096)
ANSWERS = "answers.jsonl"


def choose(names: list[str], variants: list[str]) -> dict[str, Attention]:
    """The methods asked for; `variants` are settings of the operator, NAME=VALUE ... each.

    Raises:
        UsageError: A name is none of `METHODS`, or a variant's option cannot be used.
    """
    check_names("--method", names, METHODS)
    chosen = {name: METHODS[name] for name in names}
    return chosen | {f"s2o, {text}": operator(read_config(None, 0, text.split(), "--s2o")) for text in variants}


def choose_tasks(names: list[str] | None, settings: Settings) -> list[str]:
    """The tasks asked for, in the order of `TASKS`.

    Raises:
        UsageError: A task or the filler is unknown, or the document cannot be read or does not go with the filler.
    """
    check_names("--task", names or [], TASKS)
    check_names("--filler", [settings.filler], FILLERS)
    if (settings.filler == "document") != (settings.text is not None):
        raise UsageError(f"--filler {settings.filler} {'takes no' if settings.text else 'needs a'} --document.")
    if settings.text is not None:
        check_document(settings.text, LEAST_LENGTH)
    return [task for task in TASKS if not names or task in names]


def main(
    model: Model = None,
    length: Annotated[
        list[int] | None,
        typer.Option(help=f"Tokens of a document; repeatable, {' and '.join(map(str, LENGTHS))} by default."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {'; '.join(METHODS)}. Repeatable; by default {', '.join(COMPARED)}."),
    ] = None,
    s2o: Annotated[
        list[str] | None, typer.Option(help="Fields of S2OConfig or Ranking, NAME=VALUE ...; repeatable.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help=f"One of {', '.join(TASKS)}; repeatable, all by default.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts of each task and length, asked at both places.")] = 100,
    depths: Annotated[int, typer.Option(min=1, help="Depths of single needles, a prompt each in turn.")] = 5,
    scored: Annotated[int, typer.Option(min=1, help="The most tokens of a document for perplexity.")] = 1024,
    filler: Annotated[
        str | None,
        typer.Option(help=f"What hides the values where a task takes any text: {', '.join(FILLERS)}; code by default."),
    ] = None,
    document: Annotated[Path | None, typer.Option(help="A text file, for --filler document.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    yarn: Annotated[float | None, typer.Option(help="Stretch the model's positions by this factor.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder for the answers, quality.json and quality.html; a run there goes on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare retrieval, aggregation and perplexity with sparse attention and with dense attention, in a real model."""
    methods = choose(method or ([] if s2o else list(COMPARED)), s2o or [])
    settings = Settings(filler or ("document" if document else "code"), document, seed, depths, scored)
    tasks = choose_tasks(task, settings)
    lengths = sorted(set(length or LENGTHS))
    place = choose_device(device)
    name = model_name(None, model and str(Path(model).resolve()))
    known = describe(name, choose_dtype(dtype, place), yarn, settings)
    if output:
        make_folder(output)
        check_configuration(output / ANSWERS, known | {"versions": versions()})
    with progress_bars(*_columns()) as progress, preferring(CUDNN_FIRST):
        bar = progress.add_task("Loading the model")
        loaded, tokenizer = load_model(model, place, choose_dtype(dtype, place))
        if yarn is not None:
            stretch(loaded, yarn)
        check_length(loaded, name, lengths[-1])
        rope = getattr(loaded.config.get_text_config(), "rope_parameters", None)
        configuration = known | {"rope": rope}
        journal = Journal(output / ANSWERS if output else None, name, configuration | {"versions": versions()})
        left = unread(journal, methods, list(itertools.product(lengths, range(samples), tasks)))
        for size, each in itertools.product(lengths, tasks):
            build_case(tokenizer, each, size, 0, settings)  # what cannot be built is said before the work begins
        layers = loaded.config.get_text_config().num_hidden_layers
        progress.update(bar, total=sum(len(some) + 1 for some in left.values()) * layers)
        try:
            prepare(left.values(), loaded, tokenizer)
            for (size, sample, each), some in left.items():
                announce(progress, bar, f"{size:,} tokens, {each} {sample + 1} of {samples}")
                case = build_case(tokenizer, each, size, sample, settings)
                check_memory(loaded, case.document)
                for outcome in read_case(loaded, case, some, lambda: progress.advance(bar)):
                    journal.add(outcome)
        finally:
            outcomes = journal.outcomes
            if output and outcomes:
                save(outcomes, configuration, place, output)
    if as_json:
        print(as_text(as_dict(outcomes, configuration, place)))
        return
    for table in tables(outcomes):
        wide_console().print(table, "")
    wide_console().print(LEGEND)


def prepare(methods: Iterable[Mapping[str, Attention]], model: Any, tokenizer: Any) -> None:
    """Let the methods that need it read a development text, Python's sources."""
    for attention in {name: one for some in methods for name, one in some.items()}.values():
        if isinstance(attention, Reusing):
            attention.prepare(model, build_development_text(tokenizer, read_texts(None), DEVELOPMENT_TOKENS))


def unread(
    journal: Journal, methods: Mapping[str, Attention], prompts: Sequence[tuple[int, int, str]]
) -> dict[tuple[int, int, str], dict[str, Attention]]:
    """The prompts, each a length, a sample and a task, that some methods have not read, with these methods."""
    left = {}
    for length, sample, task in prompts:
        names = [name for name in (DENSE, *methods) if (name, task, length, sample) not in journal]
        if names:
            left[length, sample, task] = {name: methods[name] for name in names if name != DENSE}
    return left


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()


def describe(name: str, dtype: torch.dtype, yarn: float | None, settings: Settings) -> dict[str, Any]:
    """What all answers of a run depend on, as far as it is known before the model is loaded."""
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "yarn": yarn,
        "s2o": {method: config.to_dict() for method, config in PRESETS.items()},
        "documents": asdict(settings) | {"text": settings.text and _digest(settings.text)},
    }


def _digest(text: Path) -> str:
    """A file's name and what tells its contents from others."""
    return f"{text.name}, SHA-256 {hashlib.sha256(text.read_bytes()).hexdigest()}"


def save(outcomes: list[Outcome], settings: dict[str, Any], device: torch.device, folder: Path) -> None:
    """Write quality.json and the page of it."""
    result = as_dict(outcomes, settings, device)
    save_result(result, folder / "quality.json")
    source = f"{result['command']}, commit {result['commit']}, {result['date']}, {result['device']}."
    save_page(outcomes, f"{settings['model']}: sparse against dense attention", source, folder / "quality.html")


if __name__ == "__main__":
    run(main)
