"""What the host takes to issue a call of attention to a GPU, and how many kernels that launches.

    python -m benchmarks.host --length 32768

The operator sparse and dense, in eager mode and in compiled graphs, beside SDPA. A graph takes some time besides its
calls, so there are graphs of several calls too, "layers compiled", with the time and the kernels of each of them. The
GPU works on random inputs meanwhile, whose numbers make no difference to the host. A first call of a length records its
plan; it is timed too.
"""

from __future__ import annotations

import dataclasses
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from s2o_compile import S2OConfig, attention
from s2o_compile._console import UsageError
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH
from s2o_compile.testbed.options import Json
from s2o_compile.timing import Run, interleaved, issuing_seconds, median_and_spread, warm_up

from .command import run
from .results import as_text, record

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

LAYERS = 4
"""Calls of a graph of several: more of them, in a batch, would wait until the GPU takes their launches."""


@dataclasses.dataclass
class Row:
    """One way to call attention.

    Attributes:
        name: Of the way.
        host: Microseconds that the host needs to issue a call, the median.
        spread: Range of the repetitions over their median.
        over: Microseconds more than SDPA needs in the same turn, the median; SDPA in layers for what is in layers.
        new: Milliseconds for the first call of another length, with kernels that are compiled, until it is issued.
        kernels: Kernels and fills that a call runs on the GPU.
    """

    name: str
    host: float
    spread: float
    over: float
    new: float | None
    kernels: int


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Dense attention by PyTorch."""
    return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def s2o(min_length: int) -> Attention:
    """`s2o_compile.attention`, sparse from a number of keys on."""
    config = S2OConfig(min_length=min_length)

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return attention(query, key, value, is_causal=True, config=config)

    return call


def layers(attend: Attention) -> Attention:
    """Several calls, each of which attends with the output of the one before as its query."""

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        for _ in range(LAYERS):
            query = attend(query, key, value)
        return query

    return call


def contenders() -> dict[str, Attention]:
    """All ways, by name."""
    sparse, dense = s2o(0), s2o(DENSE_AT_ANY_LENGTH)
    return {
        "SDPA": sdpa,
        "dense": dense,
        "dense, compiled": torch.compile(dense, fullgraph=True, dynamic=False),
        "sparse": sparse,
        "sparse, compiled": torch.compile(sparse, fullgraph=True, dynamic=False),
        "SDPA, layers compiled": torch.compile(layers(sdpa), fullgraph=True, dynamic=False),
        "dense, layers compiled": torch.compile(layers(dense), fullgraph=True, dynamic=False),
        "sparse, layers compiled": torch.compile(layers(sparse), fullgraph=True, dynamic=False),
        "sparse, CUDA graph": torch.compile(sparse, fullgraph=True, dynamic=False, mode="reduce-overhead"),
    }


@torch.no_grad()
def measure(attentions: dict[str, Attention], inputs: list[torch.Tensor], repetitions: int) -> Iterator[Row]:
    """Time the ways to call attention, which take turns, as the host is now faster and now slower."""
    runs: dict[str, Run] = {name: partial(attend, *inputs) for name, attend in attentions.items()}
    for name, call in runs.items():
        reason = warm_up(call) or warm_up(call)
        if reason:
            raise RuntimeError(f"{name}: {reason}")
    times = interleaved(runs, repetitions, issuing_seconds)
    for name, attend in attentions.items():
        calls = LAYERS if "layers" in name else 1
        beside = times["SDPA, layers compiled" if "layers" in name else "SDPA"]
        seconds, spread = median_and_spread(times[name])
        over = statistics.median(map(operator.sub, times[name], beside))
        new = None if "," in name else 1e3 * seconds_of_a_new_length(attend, inputs)
        yield Row(name, 1e6 * seconds / calls, spread, 1e6 * over / calls, new, kernels(runs[name]) // calls)


def seconds_of_a_new_length(attend: Attention, inputs: list[torch.Tensor]) -> float:
    """The first call of a length for which kernels are compiled, but nothing else is known, until it is issued."""
    # Of the same multiple of 16 as the next, for which Triton compiles the same kernels.
    for length in (inputs[0].shape[2] - 32, inputs[0].shape[2] - 64):
        shorter = [x[:, :, :length].contiguous() for x in inputs]
        torch.cuda.synchronize()
        start = time.perf_counter()
        attend(*shorter)
        seconds = time.perf_counter() - start
    return seconds


def kernels(call: Run) -> int:
    """What a call runs on the GPU, kernels and fills."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = profiled.events() or ()
    return sum(event.device_type == DeviceType.CUDA and not event.is_user_annotation for event in events)


def render(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(title="The host's part of a call")
    for column in ("attention", "host µs", "spread", "over SDPA", "new length ms", "kernels"):
        table.add_column(column, justify="right")
    for row in rows:
        new = "" if row.new is None else f"{row.new:.2f}"
        table.add_row(row.name, f"{row.host:.0f}", f"{row.spread:.0%}", f"{row.over:+.0f}", new, str(row.kernels))
    return table


def main(
    length: Annotated[int, typer.Option(min=256, help="Queries and keys.")] = 32768,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 12,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 2,
    channels: Annotated[int, typer.Option(min=16, max=256, help="Head dimension.")] = 128,
    repetitions: Annotated[int, typer.Option(min=1, help="Batches of calls, whose median is taken.")] = 50,
    as_json: Json = False,
) -> None:
    """Time the host's part of a call of attention; the default shapes are those of Qwen2.5-1.5B."""
    if not torch.cuda.is_available():
        raise UsageError("benchmarks.host needs a CUDA device.")
    device = torch.device("cuda", 0)
    inputs = [
        torch.randn(1, n, length, channels, device=device, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads)
    ]
    rows = list(measure(contenders(), inputs, repetitions))
    if as_json:
        measures = {"host": ("µs", "spread"), "over": ("µs", None), "new": ("ms", None), "kernels": ("kernels", None)}
        settings = {"length": length, "heads": heads, "kv_heads": kv_heads, "channels": channels}
        print(as_text(record("host", list(map(dataclasses.asdict, rows)), ("name",), measures, device, settings)))
    else:
        Console().print(render(rows))


if __name__ == "__main__":
    run(main)
