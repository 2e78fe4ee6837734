"""Profiles of attention while a model runs: what each site visits, how long it takes, and how far off it is."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ._console import as_text
from .ops.density import dense_pairs
from .ops.observe import SparseInputs, recording
from .ops.result import AttentionResult
from .ops.sampled_error import sampled_error

if TYPE_CHECKING:
    from rich.table import Table


@contextmanager
def profile(error_rows: int = 4) -> Iterator[Profile]:
    """Watch the sparse calls that this thread makes in a ``with`` block, in any number of models.

    Seen are calls of ``torch.ops.s2o.attention``, through ``attn_implementation="s2o"`` and in compiled graphs, that
    take the sparse path. Calls that run dense are not. A GPU is not waited for before the numbers are read.

    Of transformers' continuous batching, whose engine works in a thread of its own for all others, every profile sees
    the calls of all models; on a GPU, read the numbers when the engine has delivered.

    CUDA graphs, which replay without Python, and packages of AOTInductor for a GPU cannot be seen.

    Args:
        error_rows: Queries of each call whose outputs are compared with dense attention; 0 for none, which saves
            their time and the memory for `error_rows` * Hq * Lk logits and a copy of the keys and values in float32.

    Yields:
        The `Profile`, which can be read inside the block and after it.

    Raises:
        ValueError: `error_rows` is negative.
    """
    if error_rows < 0:
        raise ValueError(f"error_rows must be at least 0, not {error_rows}")
    profiled = Profile(error_rows)
    with recording(profiled):
        yield profiled


@dataclass(frozen=True)
class SiteProfile:
    """What the calls of one attention site did, all together.

    Attributes:
        name: The module in a compiled graph, the layer in transformers, and else the shapes of the call.
        calls: How often it was called.
        density: Visited (query, key) pairs over those that a dense kernel visits (`ops.density`).
        flops: Floating-point operations of the visited work, 2 * (D + Dv) a pair; those that rank keys not counted.
        seconds: Time of the operator, ranking included.
        time_share: Its share of the time of all sites.
        error: Relative squared error, `sum |o - o_dense|^2 / sum |o_dense|^2`, over all heads of a sample of queries,
            dense attention in float32, before attention sinks; the rounding of outputs counts too. None where no
            sample was taken. Errors are heavy-tailed: single rows may decide it.
    """

    name: str
    calls: int
    density: float
    flops: int
    seconds: float
    time_share: float
    error: float | None


class Profile:
    """What was seen of the operator; read `sites`, print it, or take `to_dict`."""

    def __init__(self, error_rows: int) -> None:
        self._error_rows = error_rows
        self._tallies: dict[str, dict[_Workload, _Tally]] = defaultdict(lambda: defaultdict(_Tally))
        self._lock = threading.Lock()

    def record(self, call: SparseInputs, result: AttentionResult, seconds: Callable[[], float]) -> None:
        """Count a call, without waiting for its results."""
        with self._lock:
            tally = self._tallies[call.name][_Workload.of(call)]
            tally.visited = tally.visited + result.visited.sum()
            if self._error_rows:
                squares = sampled_error(call, result.output, self._error_rows, tally.calls)
                tally.squares = squares if tally.squares is None else tally.squares + squares
            tally.seconds.append(seconds)
            tally.calls += 1

    @property
    def sites(self) -> list[SiteProfile]:
        """The sites in the order of their first calls; a GPU is waited for."""
        with self._lock:
            seconds = {name: sum(tally.time() for tally in tallies.values()) for name, tallies in self._tallies.items()}
            total = sum(seconds.values())
            return [
                _site(name, tallies, seconds[name], seconds[name] / total if total else 0.0)
                for name, tallies in self._tallies.items()
            ]

    def to_dict(self) -> dict[str, Any]:
        """The sites, and the time of all of them in seconds, in types that JSON has."""
        sites = self.sites
        return {"seconds": sum(site.seconds for site in sites), "sites": [asdict(site) for site in sites]}

    def __rich__(self) -> Table:
        from rich.table import Table

        sites = self.sites
        seconds = sum(site.seconds for site in sites)
        table = Table(title=f"s2o: {sum(site.calls for site in sites)} sparse calls in {seconds:.3g} s")
        table.add_column("site", overflow="fold")
        for column in ("calls", "density", "GFLOP", "ms a call", "time", "relative error"):
            table.add_column(column, justify="right")
        for site in sites:
            table.add_row(*_row(site))
        if not sites:
            table.caption = "s2o_compile.explain says which attention stays dense, and why"
        return table

    def __str__(self) -> str:
        return as_text(self)


class _Workload(NamedTuple):
    """What the work of a call depends on, and the device that counts it."""

    batch: int
    heads: int
    queries: int
    keys: int
    channels: int
    is_causal: bool
    causal_offset: int
    window: int | None
    tile: int
    device: torch.device

    @classmethod
    def of(cls, call: SparseInputs) -> _Workload:
        terms = call.visibility
        batch, heads, queries, _ = call.query.shape
        return cls(
            batch,
            heads,
            queries,
            call.key.shape[2],
            call.query.shape[3] + call.value.shape[3],
            terms.is_causal,
            terms.causal_offset,
            terms.window,
            call.config.ranking.tile,
            call.query.device,
        )

    @property
    def dense_pairs(self) -> int:
        """The pairs that a dense kernel visits, of all heads over the batch."""
        pairs = dense_pairs(self.queries, self.keys, self.is_causal, self.causal_offset, self.tile, self.window)
        return self.batch * self.heads * pairs


@dataclass
class _Tally:
    """The sums over calls of one workload; `visited` and `squares` [2] are tensors that a GPU may still compute."""

    calls: int = 0
    visited: torch.Tensor | int = 0
    squares: torch.Tensor | None = None
    seconds: list[Callable[[], float]] = field(default_factory=list)
    measured: float = 0.0

    def time(self) -> float:
        """Seconds that the calls took."""
        pending, self.seconds = self.seconds, []
        self.measured += sum(seconds() for seconds in pending)
        return self.measured


def _site(name: str, tallies: dict[_Workload, _Tally], seconds: float, time_share: float) -> SiteProfile:
    visited = {workload: int(tally.visited) for workload, tally in tallies.items()}
    dense = sum(workload.dense_pairs * tally.calls for workload, tally in tallies.items())
    return SiteProfile(
        name=name,
        calls=sum(tally.calls for tally in tallies.values()),
        density=sum(visited.values()) / max(1, dense),
        flops=sum(2 * workload.channels * pairs for workload, pairs in visited.items()),
        seconds=seconds,
        time_share=time_share,
        error=_relative_error([tally.squares for tally in tallies.values() if tally.squares is not None]),
    )


def _relative_error(squares: list[torch.Tensor]) -> float | None:
    """The sum of squared errors over that of squared outputs, [2] each; None without samples, or if not a number."""
    if not squares:
        return None
    error, dense = torch.stack([pair.cpu() for pair in squares]).sum(0).tolist()
    relative = error / dense if dense else math.nan
    return relative if math.isfinite(relative) else None


def _row(site: SiteProfile) -> list[str]:
    return [
        site.name,
        str(site.calls),
        f"{site.density:.3f}",
        f"{site.flops / 1e9:.3g}",
        f"{site.seconds / site.calls * 1e3:.3g}",
        f"{site.time_share:.1%}",
        "-" if site.error is None else f"{site.error:.1e}",
    ]
