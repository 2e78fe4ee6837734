"""The command line of the paper's claims."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from s2o_compile.testbed.document import build_document, read_texts
from s2o_compile.testbed.model import check_length, choose_device, choose_dtype, load_model, model_name
from s2o_compile.testbed.options import Device, Json, make_folder
from s2o_compile.testbed.predict import prefill_inputs

from ..capture import capture
from ..captured import Layer, load_layer
from ..command import progress_bars, run, wide_console
from ..density import check_density
from ..prefill.models import RANDOM_LLAMA
from ..prefill.models import load as load_subject
from ..results import as_text, save
from .claims import CLAIMS, Row, as_dict, table
from .layers import measure
from .times import attention, prefill

LAYERS = (10, 20)
"""Of SmolLM2, captured where no files are given."""
SHAPE = "llama-3.1-8b"
DEPTH = 32
"""Layers of the model of random weights."""


def main(
    captures: Annotated[
        list[Path] | None, typer.Argument(help="Files of benchmarks.capture; layers of the model without any.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A transformers model; SmolLM2-135M by default.")] = None,
    layer: Annotated[
        list[int] | None,
        typer.Option(min=0, help=f"A layer to capture; repeatable, by default {' and '.join(map(str, LAYERS))}."),
    ] = None,
    length: Annotated[int, typer.Option(min=1024, help="Tokens to capture, or the first ones of files.")] = 4096,
    every: Annotated[int, typer.Option(min=1, help="Judge one strip of 128 rows in EVERY.")] = 1,
    time_length: Annotated[int, typer.Option(min=1024, help="Tokens of the claims about time, on a GPU.")] = 131_072,
    density: Annotated[float, typer.Option(help="What these visit.")] = 0.05,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed calls and prefills of each.")] = 3,
    device: Device = "auto",
    output: Annotated[Path | None, typer.Option(help="Folder for paper.json.")] = None,
    as_json: Json = False,
) -> None:
    """Set the claims of S2O's paper beside what this operator does, as published, fastest, and with lookups kept."""
    place = choose_device(device)
    check_density(density)
    if output:
        make_folder(output)
    settings = {"every": every, "density": density, "repetitions": repetitions}
    rows: list[Row] = []
    with progress_bars() as progress:
        for some in read_layers(captures, model, layer or list(LAYERS), length, place, progress):
            step = progress.add_task(some.name)
            rows += measure(some, every)
            progress.remove_task(step)
        if place.type == "cuda":
            rows += time_claims(time_length, density, place, repetitions, progress)
    rows.sort(key=lambda row: CLAIMS.index(row.claim))
    found = as_dict(rows, place, settings)
    if output:
        save(found, output / "paper.json")
    if as_json:
        print(as_text(found))
        return
    wide_console().print(table(rows))
    if place.type != "cuda":
        wide_console().print("The claims about time need a GPU.")


def read_layers(
    captures: list[Path] | None, model: str | None, indices: list[int], length: int, device: torch.device,
    progress: Progress,
) -> Iterator[Layer]:  # fmt: skip
    """The first tokens of captured layers, in float32; without files, those of a model that reads Python's sources."""
    if captures:
        yield from (load_layer(path, device).first(length) for path in captures)
        return
    step = progress.add_task("Capturing layers", total=None)
    loaded, tokenizer = load_model(model, device, choose_dtype("auto", device))
    name = model_name(loaded, model)
    check_length(loaded, name, length)
    text = build_document(tokenizer, read_texts(None), length)
    found: list[Layer] = []
    capture(loaded, prefill_inputs(text, device), found.append, set(indices))
    progress.remove_task(step)
    for layer in found:
        tensors = {part: getattr(layer, part).float() for part in ("query", "key", "value")}
        yield replace(layer, name=f"{name}, {layer.name}", **tensors)


def time_claims(
    length: int, density: float, device: torch.device, repetitions: int, progress: Progress
) -> Iterator[Row]:
    """The claims about time, of the shape of Llama-3.1-8B, whose weights are random."""
    step = progress.add_task("Calls", total=None)

    def show(name: str) -> None:
        progress.update(step, description=name)

    dtype = choose_dtype("auto", device)
    yield from attention(SHAPE, length, density, device, dtype, repetitions, show)
    yield from prefill(load_subject(RANDOM_LLAMA, DEPTH, device, dtype), length, density, repetitions, show)


if __name__ == "__main__":
    run(main)
