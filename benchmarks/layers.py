"""Time, density and error of the operator beside SDPA, on what each layer of a language model really attends.

    python -m benchmarks.layers --length 8192 --option threshold=0.002

The model (SmolLM2-135M by default) prefills a document once, densely; on the way every attention call is timed with
SDPA and with the operator in turn. Times are medians of the repetitions.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from s2o_compile._console import UsageError
from s2o_compile.ops import AttentionResult, S2OConfig
from s2o_compile.ops.density import density
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept
from s2o_compile.testbed.document import build_document, check_document, read_texts
from s2o_compile.testbed.model import choose_device, choose_dtype, load_model, model_name
from s2o_compile.testbed.options import Device, Json, read_config
from s2o_compile.testbed.predict import prefill_inputs

from .command import progress_bars, run
from .results import as_text, record

MEASURES: dict[str, tuple[str, str | None]] = {
    "sdpa": ("s", None),
    "s2o": ("s", None),
    "density": ("share", None),
    "error": ("relative squared error", None),
}


@dataclasses.dataclass
class Row:
    """One attention call: seconds by contender, share of the attention computed, relative squared error."""

    sdpa: float
    s2o: float
    density: float
    error: float


def compare(call: SdpaInputs, config: S2OConfig, repetitions: int) -> tuple[torch.Tensor, Row]:
    """SDPA's output for one call, and what was measured; only calls as in a prefill of one document.

    Raises:
        UsageError: The call has a mask or dropout.
    """
    if not call.is_plain:
        raise UsageError("Attention with a mask or dropout is not compared.")
    tensors, shared = (call.query, call.key, call.value), {"is_causal": call.is_causal, "scale": call.scale}
    runs = {
        "sdpa": call.dense,
        "s2o": lambda: torch.ops.s2o.attention_stats(*tensors, **shared, **config.arguments()),
    }
    results: dict[str, Any] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, contender in runs.items():
            start = time.perf_counter()
            results[name] = contender()
            if call.query.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    dense, sparse = results["sdpa"], AttentionResult(*results["s2o"])
    lengths = call.query.shape[2], call.key.shape[2]
    share = density(sparse.visited, *lengths, call.is_causal, 0, config.ranking.tile).mean()
    wrong = (sparse.output.double() - dense.double()).square().sum() / dense.double().square().sum()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return dense, Row(**medians, density=float(share), error=float(wrong))


def table(rows: list[Row]) -> Table:
    """One line a layer, and all of them together."""
    shown = Table("layer", "SDPA, ms", "s2o, ms", "ratio", "density", "relative error")
    mean = Row(*(statistics.mean(getattr(row, field.name) for row in rows) for field in dataclasses.fields(Row)))
    for name, row in [*((str(n), row) for n, row in enumerate(rows)), ("mean", mean)]:
        shown.add_row(
            name,
            f"{row.sdpa * 1e3:.0f}",
            f"{row.s2o * 1e3:.0f}",
            f"{row.sdpa / row.s2o:.2f}",
            f"{row.density:.3f}",
            f"{row.error:.1e}",
        )
    return shown


def main(
    length: Annotated[int, typer.Option(help="Tokens to prefill.")] = 8192,
    model: Annotated[str | None, typer.Option(help="A transformers model; SmolLM2-135M by default.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file; Python's standard library by default.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="A field of S2OConfig or Ranking, NAME=VALUE.")] = None,
    device: Device = "auto",
    repetitions: Annotated[int, typer.Option(min=1, help="Runs of each contender per layer.")] = 3,
    as_json: Json = False,
) -> None:
    """Time the operator and SDPA on each layer of a model that prefills a document."""
    place = choose_device(device)
    check_document(document, length)
    config = read_config(None, 0, option or [])
    loaded, tokenizer = load_model(model, place, choose_dtype("auto", place))
    text = build_document(tokenizer, read_texts(document), length)
    with progress_bars() as progress, torch.no_grad():
        task = progress.add_task("Prefill", total=loaded.config.num_hidden_layers)
        rows: list[Row] = []

        def measure(call: SdpaInputs) -> torch.Tensor:
            dense, row = compare(call, config, repetitions)
            rows.append(row)
            progress.advance(task)
            return dense

        with SdpaIntercept(measure):
            loaded(**prefill_inputs(text, place))
    if as_json:
        settings = {
            "model": model_name(loaded, model), "length": length, "repetitions": repetitions, "s2o": config.to_dict(),
        }  # fmt: skip
        layers = [{"layer": number, **dataclasses.asdict(row)} for number, row in enumerate(rows)]
        print(as_text(record("layers", layers, ("layer",), MEASURES, place, settings)))
    else:
        Console().print(table(rows))


if __name__ == "__main__":
    run(main)
