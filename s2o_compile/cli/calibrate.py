"""``s2o calibrate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .._console import UsageError
from ..testbed.options import Device, Document, DType, Fields, Json, Length, Model, check_file, make_folder, read_config


def calibrate(
    model: Model = None,
    error_budget: Annotated[
        float, typer.Option(help="Relative squared error that each call of attention may have.")
    ] = 1e-3,
    length: Length = 8192,
    texts: Annotated[int, typer.Option(min=1, help="How many documents to read.")] = 1,
    document: Document = None,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = Path("calibration.json"),
    option: Fields = None,
    device: Device = "auto",
    dtype: DType = "auto",
    json_only: Json = False,
) -> None:
    """Find the threshold of each attention site that keeps an error budget, and write them to a file."""
    from rich.console import Console

    from .. import calibrate as calibrate_model
    from .._console import Progress
    from ..testbed.predict import prefill_inputs
    from ..testbed.prepare import prepare_prefills

    config = read_config(None, None, option or [])
    if not 0 < error_budget < 1:
        raise UsageError(f"--error-budget must be between 0 and 1, not {error_budget:g}.")
    try:
        config.arguments()
    except ValueError as error:
        raise UsageError(f"{error}.") from error
    make_folder(output.parent)
    check_file(output)
    loaded, documents = prepare_prefills(model, length, texts, document, device, dtype, Progress())
    inputs = [prefill_inputs(text, loaded.device) for text in documents]
    found = calibrate_model(loaded, inputs, error_budget=error_budget, output=output, config=config)
    if json_only:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        Console().print(found)
        print(f"Saved {output}.")
