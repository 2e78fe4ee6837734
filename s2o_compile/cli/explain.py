"""``s2o explain``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import app
from .options import Device, DType, Fields, Json, Length, MinLength, Threshold, read_config


@app.command()
def explain(
    model: Annotated[
        str | None,
        typer.Argument(help="A transformers model, by path or hub id; default SmolLM2-135M-Instruct."),
    ] = None,
    length: Length = 8192,
    document: Annotated[
        Path | None, typer.Option(help="A text file to read; Python's standard library by default.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Count the work of each site; takes longer.")] = False,
    threshold: Threshold = None,
    min_length: MinLength = None,
    option: Fields = None,
    device: Device = "auto",
    dtype: DType = "auto",
    json_only: Json = False,
) -> None:
    """Prefill a document once and report each attention site: sparse or dense, what its mask says, and why."""
    from rich.console import Console

    from ..demo import Progress
    from ..demo.explain import explain_model

    config = read_config(threshold, min_length, option or [])
    report = explain_model(model, length, document, config, device, dtype, measure, Progress())
    if json_only:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(report)
