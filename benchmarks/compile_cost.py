"""How much of the time that compiling takes, the graph passes take.

    python -m benchmarks.compile_cost --layers 32

A Llama of random weights is compiled with the backend s2o, with and without a padding mask, in both spellings of its
attention. The passes are timed inside of that, Inductor's caches are off.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from s2o_compile.ops import S2OConfig
from s2o_compile.passes import rewrite
from s2o_compile.testbed.options import Json

from .command import run
from .results import as_text, record

CALLS = [(spelling, padded) for spelling in ("sdpa", "eager") for padded in (False, True)]


@dataclasses.dataclass
class Row:
    """One compilation: the spelling of attention, the sites rewritten, and seconds."""

    spelling: str
    padded: bool
    sites: int
    passes: float
    total: float

    @property
    def share(self) -> float:
        """The part of the total that the passes take."""
        return self.passes / self.total


class Timed:
    """The backend s2o, with the seconds that its passes took and the sites that they rewrote."""

    def __init__(self, config: S2OConfig) -> None:
        self.config, self.seconds, self.sites = config, 0.0, 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        start = time.perf_counter()
        decisions = rewrite(module, self.config)
        self.seconds += time.perf_counter() - start
        self.sites += sum(decision.rewritten for decision in decisions)
        compiled: Any = compile_fx(module, example_inputs)
        return compiled


def build_model(layers: int, spelling: str) -> torch.nn.Module:
    """A small Llama of random weights."""
    from transformers import AutoModel, LlamaConfig

    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model: torch.nn.Module = AutoModel.from_config(config, attn_implementation=spelling)
    return model.eval()


@torch.no_grad()
def measure(layers: int, length: int, spelling: str, padded: bool) -> Row:
    """Compile one model from nothing."""
    torch._dynamo.reset()
    model, backend = build_model(layers, spelling), Timed(S2OConfig(min_length=0))
    ids = torch.randint(128, (2, length))
    mask = torch.ones_like(ids)
    mask[0, : length // 4] = 0
    start = time.perf_counter()
    with torch._inductor.utils.fresh_cache():
        torch.compile(model, backend=backend)(ids, attention_mask=mask if padded else None, use_cache=False)
    return Row(spelling, padded, backend.sites, backend.seconds, time.perf_counter() - start)


def render(rows: list[Row]) -> Table:
    """The rows as a table."""
    table = Table(title="Compile time")
    for column in ("attention", "padding mask", "sites", "passes s", "total s", "share"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = f"{row.passes:.2f}", f"{row.total:.1f}", f"{row.share:.1%}"
        table.add_row(row.spelling, "yes" if row.padded else "no", str(row.sites), *cells)
    return table


def main(
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 32,
    length: Annotated[int, typer.Option(min=16, help="Tokens of its input.")] = 256,
    as_json: Json = False,
) -> None:
    """Time the graph passes within whole compilations."""
    console = Console(stderr=True)
    rows = [measure(layers, length, *call) for call in track(CALLS, "Compile", transient=True, console=console)]
    if as_json:
        measures = {"sites": ("sites", None), "passes": ("s", None), "total": ("s", None)}
        settings = {"layers": layers, "length": length}
        found = list(map(dataclasses.asdict, rows))
        place = torch.device("cpu")
        print(as_text(record("compile_cost", found, ("spelling", "padded"), measures, place, settings)))
    else:
        Console().print(render(rows))


if __name__ == "__main__":
    run(main)
