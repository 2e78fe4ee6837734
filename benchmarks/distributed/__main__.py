"""One sequence over several GPUs: the operator and a prefill, beside one GPU.

    python -m benchmarks.distributed --length 131072 --density 0.05
    python -m benchmarks.distributed --subject smollm2 --length 8192

It starts a process for each rank, over NCCL on GPUs and gloo on a CPU. The operator attends random inputs of a shape,
made such that it visits a density, as in `speed`; models prefill as in `prefill`, with ``attn_implementation="s2o"``.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from s2o_compile._console import UsageError
from s2o_compile.ops.layout import LAYOUTS
from s2o_compile.testbed.document import check_document
from s2o_compile.testbed.model import check_model, choose_device, choose_dtype
from s2o_compile.testbed.options import Device, DType, Json, check_names, make_folder, read_config
from s2o_compile.timing import attempt

from ..command import by_device, progress_bars, run, wide_console
from ..density import check_density
from ..prefill.models import RANDOM_LLAMA, SMOLLM2
from ..results import as_text, save
from ..speed.shapes import SHAPES
from .heads import measure_heads
from .operator import measure_operator
from .prefill import measure_prefill
from .ranks import on_ranks
from .report import as_dict, table
from .row import HEADS, OPERATOR, Case, Row

LENGTHS = {"cpu": [2048], "cuda": [32768, 131_072]}
DENSITY = 0.05


def main(
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{OPERATOR}, {RANDOM_LLAMA} (random weights), {SMOLLM2}, or a transformers model; repeatable, "
            f"{OPERATOR} by default."
        ),
    ] = None,
    shape: Annotated[str, typer.Option(help=f"Of the operator: {', '.join(SHAPES)}.")] = RANDOM_LLAMA,
    layers: Annotated[int, typer.Option(min=1, help="Of a model of random weights.")] = 4,
    length: Annotated[list[int] | None, typer.Option(min=64, help=f"Positions; {by_device(LENGTHS)}")] = None,
    ranks: Annotated[list[int] | None, typer.Option(min=2, help="Beside one; 2 by default; repeatable.")] = None,
    layout: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(LAYOUTS)}, or {HEADS} for the operator; repeatable, {LAYOUTS[0]} by default."),
    ] = None,
    density: Annotated[float, typer.Option(help="Share to visit where inputs are random.")] = DENSITY,
    s2o: Annotated[str, typer.Option(help="Fields of S2OConfig or Ranking, NAME=VALUE ...")] = "",
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 5,
    device: Device = "auto",
    dtype: DType = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for distributed.json.")] = None,
    as_json: Json = False,
) -> None:
    """Time attention and prefills of one sequence over several GPUs."""
    place = choose_device(device)
    subjects, counts, layouts = subject or [OPERATOR], ranks or [2], layout or [LAYOUTS[0]]
    lengths = length or LENGTHS[place.type]
    check(shape, layouts, lengths, counts, density, place)
    if HEADS in layouts:
        check_heads(subjects, shape, counts)
    for name in set(subjects) - {OPERATOR, RANDOM_LLAMA, SMOLLM2}:
        check_model(name)
    if any(name not in (OPERATOR, RANDOM_LLAMA) for name in subjects):
        check_document(document, min(lengths))
    if output:
        make_folder(output)
    config, precision = read_config(None, None, s2o.split(), "--s2o"), choose_dtype(dtype, place)
    rows: list[Row] = []
    with progress_bars() as progress:
        task = progress.add_task("", total=None)
        for name in subjects:
            is_random = name in (OPERATOR, RANDOM_LLAMA)
            for tokens in lengths:
                case = Case(
                    name, shape, layers, tokens, layouts[0], config, density if is_random else None, document,
                    repetitions, place.type, precision,
                )  # fmt: skip
                progress.update(task, description=f"{name}, {tokens:,} positions")
                rows += measure(case, counts, layouts)
                if output:
                    save(as_dict(case, rows), output / "distributed.json")
    if as_json:
        print(as_text(as_dict(case, rows)))
    else:
        wide_console().print(table(rows))


def measure(case: Case, counts: list[int], layouts: list[str]) -> list[Row]:
    """The rows of one rank, and of all others, which take its inputs or threshold and are compared with it."""
    runs = [(1, LAYOUTS[0]), *((count, layout) for count in counts for layout in layouts)]
    rows: list[Row] = []
    logits: torch.Tensor | None = None
    for count, layout in runs:
        own = dataclasses.replace(case, layout=layout)
        setting = rows[0].setting if rows else None
        row: Row | None
        if case.subject == OPERATOR:
            of_ranks = measure_heads if layout == HEADS else measure_operator
            row, reason = attempt(partial(on_ranks, count, case.device, of_ranks, own, setting))
        else:
            found, reason = attempt(partial(on_ranks, count, case.device, measure_prefill, own, setting, logits))
            row, last = found or (None, None)
            logits = last if logits is None else logits
        row = row or Row(case.subject, case.length, count, layout if count > 1 else "", reason=reason)
        rows.append(row)
        if row.seconds and rows[0].seconds:
            row.speedup = rows[0].seconds / row.seconds
    return rows


def check(
    shape: str, layouts: list[str], lengths: list[int], counts: list[int], density: float, device: torch.device
) -> None:
    """Check what was asked for.

    Raises:
        UsageError: It cannot be run here.
    """
    check_names("--shape", [shape], SHAPES)
    check_names("--layout", layouts, (*LAYOUTS, HEADS))
    check_density(density)
    uneven = next((one for one in lengths for count in counts if one % (2 * count)), None)
    if uneven is not None:
        raise UsageError(f"--length must be a multiple of twice the --ranks, not {uneven}.")
    if device.type == "cuda" and torch.cuda.device_count() < max(counts):
        raise UsageError(f"--ranks {max(counts)} needs as many GPUs, and PyTorch finds {torch.cuda.device_count()}.")


def check_heads(subjects: list[str], shape: str, counts: list[int]) -> None:
    """Check what is asked for with heads sharded over ranks.

    Raises:
        UsageError: It cannot be run.
    """
    model = next((name for name in subjects if name != OPERATOR), None)
    if model is not None:
        raise UsageError(f"--layout {HEADS} is of the {OPERATOR} alone, not of {model}.")
    uneven = next((count for count in counts if SHAPES[shape].kv_heads % count), None)
    if uneven is not None:
        raise UsageError(f"--ranks must divide the {SHAPES[shape].kv_heads} KV heads of {shape}, not be {uneven}.")


if __name__ == "__main__":
    run(main)
