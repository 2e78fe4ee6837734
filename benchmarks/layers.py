"""Time, density and error of the operator beside SDPA, on what each layer of a language model really attends.

    python -m benchmarks.layers --length 8192 --option threshold=0.002

The model (SmolLM2-135M by default) prefills a document once, densely; on the way every attention call is timed with
SDPA and with the operator in turn. Times are medians of the repetitions.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from s2o_compile.cli.options import read_config
from s2o_compile.demo.document import build_document, read_texts
from s2o_compile.demo.measure import prefill_inputs
from s2o_compile.demo.model import choose_device, choose_dtype, load_model
from s2o_compile.ops import AttentionResult, S2OConfig
from s2o_compile.ops.density import density


@dataclasses.dataclass
class Row:
    """One attention call: seconds by contender, share of the attention computed, relative squared error."""

    sdpa: float
    s2o: float
    density: float
    error: float


class Comparison(TorchFunctionMode):
    """Measures every call of SDPA beside the operator, and goes on with SDPA's output."""

    def __init__(self, config: S2OConfig, repetitions: int, progress: Callable[[], None]) -> None:
        super().__init__()
        self.config, self.repetitions, self.progress = config, repetitions, progress
        self.rows: list[Row] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        dense, row = self.compare(args, kwargs or {})
        self.rows.append(row)
        self.progress()
        return dense

    def compare(self, tensors: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[torch.Tensor, Row]:
        """Measure one call; only those without a mask, which is what a prefill of one document has."""
        if arguments.get("attn_mask") is not None or arguments.get("dropout_p"):
            raise ValueError("attention with a mask or dropout is not compared")
        shared = {"is_causal": arguments.get("is_causal", False), "scale": arguments.get("scale")}
        runs = {
            "sdpa": lambda: scaled_dot_product_attention(*tensors, **arguments),
            "s2o": lambda: torch.ops.s2o.attention_stats(*tensors, **shared, **self.config.arguments()),
        }
        results: dict[str, Any] = {}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(self.repetitions):
            for name, run in runs.items():
                start = time.perf_counter()
                results[name] = run()
                if tensors[0].is_cuda:
                    torch.cuda.synchronize()
                times[name].append(time.perf_counter() - start)
        dense, sparse = results["sdpa"], AttentionResult(*results["s2o"])
        lengths = tensors[0].shape[2], tensors[1].shape[2]
        share = density(sparse.visited, *lengths, shared["is_causal"], 0, self.config.tile).mean()
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
    option: Annotated[list[str] | None, typer.Option(help="A field of S2OConfig, NAME=VALUE.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    repetitions: Annotated[int, typer.Option(help="Runs of each contender per layer.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the operator and SDPA on each layer of a model that prefills a document."""
    place = choose_device(device)
    loaded, tokenizer = load_model(model, place, choose_dtype("auto", place))
    text = build_document(tokenizer, read_texts(document), length)
    config = read_config(None, 0, option or [])
    with Progress(console=Console(stderr=True), transient=True) as progress, torch.no_grad():
        task = progress.add_task("Prefill", total=loaded.config.num_hidden_layers)
        with Comparison(config, repetitions, lambda: progress.advance(task)) as comparison:
            loaded(**prefill_inputs(text, place))
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in comparison.rows]))
    else:
        Console().print(table(comparison.rows))


if __name__ == "__main__":
    typer.run(main)
