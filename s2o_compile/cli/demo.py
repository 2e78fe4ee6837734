"""``s2o demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .._console import UsageError
from ..testbed.options import (
    Device,
    Document,
    DType,
    Fields,
    Json,
    Length,
    MinLength,
    Threshold,
    make_folder,
    read_config,
)

if TYPE_CHECKING:
    from ..demo import Results


def demo(
    length: Length = 8192,
    document: Document = None,
    model: Annotated[
        str | None,
        typer.Option(help="A transformers model, by path or hub id; default SmolLM2-135M-Instruct."),
    ] = None,
    threshold: Threshold = None,
    min_length: MinLength = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Sparse attention also where it does not pay on this device: min_length is 0."),
    ] = False,
    option: Fields = None,
    device: Device = "auto",
    dtype: DType = "auto",
    repeats: Annotated[int | None, typer.Option(help="Timed prefills of each; 1 on a CPU, 5 on a GPU.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the hidden values.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("s2o-demo"),
    json_only: Json = False,
) -> None:
    """Prefill a long document eagerly, with Inductor and with s2o, and compare time and answers.

    The model is called as with model(**tokenizer(text)), with the tokenizer's attention mask. Attention that would not
    gain on this device by being sparse runs dense, as everywhere, and then saves only the mask, which Inductor
    computes: SmolLM2 does on a GPU at all of its lengths. --force makes it sparse.
    """
    from .._console import Progress
    from ..demo import Settings, run_demo

    config = read_config(threshold, min_length, option or [])
    if force and config.min_length is not None:
        raise UsageError("--force sets min_length to 0: give it without another.")
    settings = Settings(length, document, model, config, device, dtype, repeats, seed, force=force)
    make_folder(output)
    results = run_demo(settings, Progress())
    _save(results, output)
    _print(results, output, json_only)


def _save(results: Results, folder: Path) -> None:
    from ..demo.report import save_json, save_picture

    save_json(results, folder / "demo.json")
    if results.density is not None:
        save_picture(results, folder / "density.png")


def _print(results: Results, folder: Path, json_only: bool) -> None:
    from rich.console import Console

    from ..demo.report import print_report

    if json_only:
        print(json.dumps(results.as_dict(), indent=2))
        return
    print_report(results, Console())
    picture = " and density.png" if results.density is not None else ""
    print(f"\nSaved demo.json{picture} in {folder}.")
