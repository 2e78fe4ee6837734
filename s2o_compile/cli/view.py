"""``s2o view``."""

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
    Model,
    Threshold,
    check_file,
    make_folder,
    read_config,
)

if TYPE_CHECKING:
    from ..view import View


def view(
    model: Model = None,
    layer: Annotated[int, typer.Option(min=0, help="The layer to look at closely.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="The query head to look at closely.")] = 0,
    length: Length = 2048,
    document: Document = None,
    output: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Folder for each picture as a PNG as well.")] = None,
    threshold: Threshold = None,
    option: Fields = None,
    device: Device = "auto",
    dtype: DType = "auto",
    json_only: Json = False,
) -> None:
    """Prefill a document and draw what sparse attention does to each head, and to one of them from near."""
    from .._console import Progress
    from ..testbed.model import model_name
    from ..testbed.predict import prefill_inputs
    from ..testbed.prepare import prepare_prefill
    from ..view import ViewError, visualize

    config, progress = read_config(threshold, None, option or []), Progress()
    for folder in filter(None, (output.parent, png)):
        make_folder(folder)
    check_file(output)
    loaded, text = prepare_prefill(model, length, document, device, dtype, progress)
    layers = getattr(loaded.config.get_text_config(), "num_hidden_layers", None)
    try:
        with progress.step("Looking at each layer") as update:
            found = visualize(
                loaded,
                layer=layer,
                head=head,
                config=config,
                output=output,
                png=png,
                name=model_name(loaded, model),
                progress=lambda done: update(done=done, total=layers),
                **prefill_inputs(text, loaded.device),
            )
    except ViewError as error:
        raise UsageError(f"{error}.") from error
    if json_only:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        _print(found, output, png)


def _print(view: View, output: Path, png: Path | None) -> None:
    from rich.console import Console
    from rich.table import Table

    figures = view.as_dict()
    table = Table("", "mean of all heads", f"layer {view.head.layer}, head {view.head.head}")
    table.add_row("density", f"{figures['density']:.3f}", f"{figures['head']['density']:.3f}")
    table.add_row("relative error", f"{figures['error']:.1e}", f"{figures['head']['error']:.1e}")
    Console().print(table)
    pictures = f" and its pictures in {png}" if png is not None else ""
    print(f"Saved {output}{pictures}.")
