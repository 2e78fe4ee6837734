"""Long prompts beside requests that decode: time to the first token, decode steps, and what pages cost.

    python -m benchmarks.serving llama-3.1-8b --layers 4 --length 32768 --density 0.05
    python -m benchmarks.serving --part replay --length 131072

The engine is transformers' continuous batching. A prompt is sent to it while other requests decode, with the attention
that transformers chooses itself ("stock"), with this one kept dense, and with this one as set; and it is prefilled by
the model alone, in one call, where the gain should be as large. A replay is one call of attention for the last part of
a prompt and one query of each neighbour, as vLLM batches them, with contiguous keys and in pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import check_document
from s2o_compile.testbed.model import check_model, choose_device, choose_dtype
from s2o_compile.testbed.options import Device, DType, Json, check_names, make_folder, read_config

from ..command import announce, by_device, progress_bars, run, wide_console
from ..density import check_density
from ..prefill.models import RANDOM_LLAMA, SMOLLM2, load
from ..results import as_text, save
from ..speed.shapes import SHAPES
from .engine import measure_model
from .replay import measure_replay
from .report import as_dict, tables
from .row import ENGINE, REPLAY, WAYS, Case, Row, compare

LENGTHS = {"cpu": [2048], "cuda": [32768, 131_072]}
PARTS = (ENGINE, REPLAY)
PAGES = [16, 64, 256]


def main(
    model: Annotated[
        str, typer.Argument(help=f"{RANDOM_LLAMA} (random weights), {SMOLLM2}, or a transformers model.")
    ] = RANDOM_LLAMA,
    layers: Annotated[int, typer.Option(min=1, help="Of a model of random weights.")] = 4,
    part: Annotated[list[str] | None, typer.Option(help=f"{' or '.join(PARTS)}; repeatable, both by default.")] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=64, help=f"Tokens of the long prompt; {by_device(LENGTHS)}")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Attention of the engine: {', '.join(map(repr, WAYS))}; repeatable, all by default."),
    ] = None,
    neighbours: Annotated[int, typer.Option(min=1, help="Requests that decode beside the prompt.")] = 16,
    context: Annotated[int, typer.Option(min=1, help="Keys that each of them starts with.")] = 4096,
    budget: Annotated[int, typer.Option(min=2, help="Tokens of a step, at most: prompts are cut to it.")] = 8192,
    page: Annotated[int, typer.Option(min=4, help="Keys of a page of the engine's cache.")] = 256,
    pages: Annotated[
        list[int] | None, typer.Option(min=1, help=f"Keys of a page of a replay; repeatable, {PAGES} by default.")
    ] = None,
    shape: Annotated[str, typer.Option(help=f"Of a replay: {', '.join(SHAPES)}.")] = RANDOM_LLAMA,
    density: Annotated[float, typer.Option(help="Share to visit where weights or inputs are random.")] = 0.05,
    s2o: Annotated[str, typer.Option(help="Fields of S2OConfig or Ranking, NAME=VALUE ...")] = "",
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Decode steps timed after each prompt.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed prompts, prefills or calls of each.")] = 5,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for serving.json.")] = None,
    as_json: Json = False,
) -> None:
    """Time long prompts beside requests that decode, in transformers' continuous batching and as vLLM batches them."""
    place, parts, ways, sizes = choose_device(device), part or PARTS, only or WAYS, pages or PAGES
    lengths = length or LENGTHS[place.type]
    check(parts, ways, shape, density, neighbours, budget)
    if ENGINE in parts and model != RANDOM_LLAMA:
        check_document(document, min(lengths))
        if model != SMOLLM2:
            check_model(model)
    if output:
        make_folder(output)
    config = read_config(None, None, s2o.split(), "--s2o")
    case = Case(
        config, density, tuple(ways), neighbours, context, budget, page, steps, repetitions, place,
        choose_dtype(dtype, place),
    )  # fmt: skip
    settings = {"model": model, "layers": layers, "shape": shape, "steps": steps}
    rows: list[Row] = []
    with progress_bars() as progress:
        total = len(lengths) * sum(steps_of(name, case, sizes) for name in parts)
        task = progress.add_task("Loading the model", total=total)
        subject = load(model, layers, place, case.dtype) if ENGINE in parts else None
        for tokens in lengths:

            def show(step: str, tokens: int = tokens) -> None:
                announce(progress, task, f"{tokens:,} tokens: {step}")
                progress.advance(task)

            own: list[Row] = []
            if subject is not None:
                own += measure_model(subject, tokens, case, document, show)
            if REPLAY in parts:
                own += measure_replay(tokens, shape, sizes, case, show)
            compare(own)
            rows += own
            found = as_dict(case, rows, **settings)
            if output:
                save(found, output / "serving.json")
    if as_json:
        print(as_text(found))
    else:
        wide_console().print(*tables(rows), sep="\n")


def steps_of(part: str, case: Case, pages: Sequence[int]) -> int:
    """Steps that are shown at each length."""
    return 2 + len(case.ways) * (1 + case.repetitions) if part == ENGINE else 3 + len(pages)


def check(parts: Sequence[str], ways: Sequence[str], shape: str, density: float, neighbours: int, budget: int) -> None:
    """Check what was asked for.

    Raises:
        UsageError: It cannot be run.
    """
    for option, given, known in (("--part", parts, PARTS), ("--only", ways, WAYS), ("--shape", [shape], SHAPES)):
        check_names(option, given, known)
    check_density(density)
    if budget <= neighbours:
        raise UsageError(f"--budget must be above --neighbours ({neighbours}), not {budget}.")


if __name__ == "__main__":
    run(main)
