"""``s2o explain``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ..testbed.options import Device, Document, DType, Fields, Json, Length, MinLength, Model, Threshold, read_config


def explain(
    model: Model = None,
    length: Length = 8192,
    document: Document = None,
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

    from .._console import Progress
    from ..testbed.explain import explain_model

    config = read_config(threshold, min_length, option or [])
    report = explain_model(model, length, document, config, device, dtype, measure, Progress())
    if json_only:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        Console().print(report)
