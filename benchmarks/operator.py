"""Time, density and error of the operator beside SDPA's backends, on structured inputs of a Llama-3.1-8B layer.

    python -m benchmarks.operator --lengths 8192 32768

On a CPU it takes the shape of a SmolLM2-135M layer instead. Times are medians of repetitions that alternate between
the contenders; ratios are to the fastest dense one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.ops import AttentionResult, S2OConfig
from s2o_compile.ops.density import density

from .inputs import structured

SETTINGS = {
    "s2o default": S2OConfig(min_length=0),
    "s2o pool 4": S2OConfig(min_length=0, pool=4, threshold=1e-3),
    "s2o paper": S2OConfig.paper(min_length=0),
}


def dense_backends(device: str) -> dict[str, SDPBackend]:
    """SDPA's backends worth comparing with."""
    if device == "cpu":
        return {"sdpa": SDPBackend.FLASH_ATTENTION}
    return {"sdpa cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa flash": SDPBackend.FLASH_ATTENTION}


def contenders(device: str) -> dict[str, Callable[..., torch.Tensor]]:
    """Functions of query, key and value."""

    def sdpa(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        return run

    def s2o(config: S2OConfig) -> Callable[..., torch.Tensor]:
        return lambda *tensors: torch.ops.s2o.attention(*tensors, is_causal=True, **config.arguments())

    dense = {name: sdpa(backend) for name, backend in dense_backends(device).items()}
    return dense | {name: s2o(config) for name, config in SETTINGS.items()}


def seconds(run: Callable[..., torch.Tensor], tensors: tuple[torch.Tensor, ...]) -> float:
    """Of one call."""
    if tensors[0].device.type == "cpu":
        start = time.perf_counter()
        run(*tensors)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(*tensors)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure(length: int, device: str, repetitions: int) -> list[dict[str, Any]]:
    """One row per contender."""
    shape = (9, 3, 64, device, torch.float32) if device == "cpu" else (32, 8, 128, device, torch.bfloat16)
    tensors = structured(length, *shape)
    runs = contenders(device)
    for run in runs.values():
        run(*tensors)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(repetitions), f"{length} positions", transient=True, console=Console(stderr=True)):
        for name, run in runs.items():
            times[name].append(seconds(run, tensors))
    medians = {name: statistics.median(values) for name, values in times.items()}
    fastest = min(medians[name] for name in dense_backends(device))
    exact = runs[next(iter(dense_backends(device)))](*tensors).float()
    rows = []
    for name, median in medians.items():
        spread = (max(times[name]) - min(times[name])) / median
        row = {
            "length": length,
            "name": name,
            "ms": 1e3 * median,
            "spread": spread,
            "ratio": fastest / median,
        }
        if name in SETTINGS:
            config = SETTINGS[name]
            result = AttentionResult(*torch.ops.s2o.attention_stats(*tensors, is_causal=True, **config.arguments()))
            visited = density(result.visited, length, length, True, 0, config.tile)
            error = (result.output.float() - exact).square().sum() / exact.square().sum()
            row |= {
                "density": float(visited.mean()),
                "error": float(error),
                "config": dataclasses.asdict(config),
            }
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table("length", "attention", "ms", "spread", "x dense", "density", "relative error")
    for row in rows:
        cells = [f"{row['ms']:.2f}", f"{row['spread']:.0%}", f"{row['ratio']:.2f}"]
        cells += [f"{row['density']:.3f}", f"{row['error']:.1e}"] if "density" in row else ["1", "0"]
        table.add_row(str(row["length"]), row["name"], *cells)
    Console(width=100).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", metavar="PATH", help="also write the rows there")
    options = parser.parse_args()
    rows = [row for length in options.lengths for row in measure(length, options.device, options.repetitions)]
    show(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=2)


if __name__ == "__main__":
    main()
