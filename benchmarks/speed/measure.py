"""One shape at one length: every contender timed in turn, and judged by the outputs of the calls that are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch

from s2o_compile.ops import S2OConfig
from s2o_compile.ops.density import dense_pairs, density
from s2o_compile.ops.observe import SparseInputs
from s2o_compile.ops.sampled_error import sampled_error
from s2o_compile.ops.visibility import Visibility
from s2o_compile.timing import (
    attempt,
    gpu_seconds,
    interleaved,
    issuing_seconds,
    kernel_seconds,
    median_and_spread,
    settled,
    wall_seconds,
    warm_up,
    with_peak_memory,
)

from ..density import find, sampled_density
from ..inputs import Structure
from .contenders import DENSE, sparse
from .shapes import SHAPES

DRAWS = 4
SHORT = 0.02
"""Seconds of a call up to which the host's part is measured."""
LOGITS = 2**26
"""Float32 numbers that each of `DRAWS` samples of the error may take for its logits."""


@dataclass(frozen=True)
class Case:
    """A shape at a length, and what is compared on it.

    Attributes:
        shape: A name in `SHAPES`.
        length: Positions.
        density: The share of dense attention's pairs that each setting is to visit: its queries are made so.
        settings: Of the operator, by name.
        dense: Names in `DENSE`.
        dense_up_to: Longer cases leave them out.
        device: Where it runs.
        dtype: Of query, key and value.
    """

    shape: str
    length: int
    density: float
    settings: dict[str, S2OConfig]
    dense: tuple[str, ...]
    dense_up_to: int
    device: torch.device
    dtype: torch.dtype

    @property
    def precision(self) -> str:
        """The name of the dtype."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def names(self) -> list[str]:
        """Of all contenders."""
        return [*self.dense, *(f"s2o, {name}" for name in self.settings)]


@dataclass
class Row:
    """One contender.

    Attributes:
        shape: A name in `SHAPES`.
        length: Positions.
        name: A name in `DENSE`, or "s2o," and a setting.
        milliseconds: Of a call, the median.
        spread: Range of its repetitions over their median.
        ratio: Time of the fastest dense contender over its own.
        asked: The density asked for; None for dense attention.
        diffuseness: Of its queries, see `Structure`.
        density: Visited pairs over those that a dense kernel visits.
        error: Relative squared error, sum |o - o_dense|^2 / sum |o_dense|^2 over a sample of rows of all heads, dense
            in float32.
        tflops: 2 * (D + Dv) floating-point operations a visited pair, in 1e12 a second of the whole call.
        ranking: Milliseconds of its kernels apart from the attention, by the profiler; None on a CPU.
        attention: Milliseconds of the kernel that attends, by the profiler; None on a CPU.
        host: Milliseconds that the host needs to issue a call; None on a CPU, and for calls that are not `SHORT`.
        mebibytes: Memory at its peak, with the output and without the inputs; None on a CPU.
        reason: Why it could not run; empty where it did.
    """

    shape: str
    length: int
    name: str
    milliseconds: float | None = None
    spread: float | None = None
    ratio: float | None = None
    asked: float | None = None
    diffuseness: float | None = None
    density: float | None = None
    error: float | None = None
    tflops: float | None = None
    ranking: float | None = None
    attention: float | None = None
    host: float | None = None
    mebibytes: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Contender:
    """A contender with its own queries: `run` calls it on them; `config` is None for dense attention."""

    row: Row
    run: Callable[[], Any]
    query: torch.Tensor
    config: S2OConfig | None


def measure(case: Case, repetitions: int, progress: Callable[[str], None]) -> list[Row]:
    """One row a contender; those that cannot run say why."""
    rows = {name: Row(case.shape, case.length, name) for name in case.names}
    torch.compiler.reset()
    progress("inputs")
    structure, reason = attempt(partial(draw, case))
    if structure is None:
        return [dataclasses.replace(row, reason=reason) for row in rows.values()]
    contenders = [*sparse_contenders(case, structure, rows, progress), *dense_contenders(case, structure, rows)]
    progress("first calls")
    for one in contenders:
        one.row.reason = warm_up(one.run)
    running = [one for one in contenders if not one.row.reason]
    progress("repetitions")
    clock = wall_seconds if case.device.type == "cpu" else settled(gpu_seconds)
    times = interleaved({one.row.name: one.run for one in running}, repetitions, clock)
    for one in running:
        progress(one.row.name)
        one.row.reason = attempt(partial(judge, case, structure, one, times[one.row.name]))[1]
    dense = [time for name in case.dense if (time := rows[name].milliseconds) is not None]
    for one in running:
        if dense and one.row.milliseconds:
            one.row.ratio = min(dense) / one.row.milliseconds
    return list(rows.values())


def draw(case: Case) -> Structure:
    """What the inputs of a case are made of."""
    shape = SHAPES[case.shape]
    return Structure.draw(case.length, shape.heads, shape.kv_heads, shape.channels, case.device, case.dtype)


def sparse_contenders(
    case: Case, structure: Structure, rows: dict[str, Row], progress: Callable[[str], None]
) -> Iterator[Contender]:
    """The settings of the operator, each with queries of which it visits the density asked for."""
    is_causal = SHAPES[case.shape].is_causal
    for name, config in case.settings.items():
        progress(f"inputs for {name}")
        row = rows[f"s2o, {name}"]
        row.asked = case.density
        row.diffuseness, row.reason = attempt(partial(diffuseness, structure, config, is_causal, case.density))
        if row.diffuseness is not None:
            query = structure.query(row.diffuseness)
            run = partial(sparse(config, is_causal), query, structure.key, structure.value)
            yield Contender(row, run, query, config)


def dense_contenders(case: Case, structure: Structure, rows: dict[str, Row]) -> Iterator[Contender]:
    """The dense backends, with queries of middling diffuseness."""
    if case.length > case.dense_up_to:
        for name in case.dense:
            rows[name].reason = f"left out beyond {case.dense_up_to:,} positions"
        return
    query = structure.query(0.5)
    for name in case.dense:
        run = partial(DENSE[name](SHAPES[case.shape].is_causal), query, structure.key, structure.value)
        yield Contender(rows[name], run, query, None)


def diffuseness(structure: Structure, config: S2OConfig, is_causal: bool, wanted: float) -> float:
    """The diffuseness of queries of which the operator visits a density, or what comes closest."""

    def density_at(diffuse: float) -> float:
        query_of = partial(structure.query, diffuse)
        return sampled_density(query_of, structure.key, structure.value, is_causal, config)

    return find(density_at, wanted, 0, 1)


def judge(case: Case, structure: Structure, contender: Contender, times: list[float]) -> None:
    """Fill in the row of a contender that ran."""
    row, shape = contender.row, SHAPES[case.shape]
    seconds, row.spread = median_and_spread(times)
    row.milliseconds = 1e3 * seconds
    result, size = with_peak_memory(contender.run, case.device)
    row.mebibytes = None if size is None else size / 2**20
    config = contender.config or S2OConfig()
    lengths = case.length, case.length, shape.is_causal, 0, config.ranking.tile
    row.density = float(density(result.visited, *lengths).mean()) if contender.config else 1.0
    pairs = shape.heads * dense_pairs(*lengths)
    row.tflops = 4 * shape.channels * pairs * row.density / seconds / 1e12
    output = result.output if contender.config else result
    row.error = relative_error(contender.query, structure, shape.is_causal, output)
    if case.device.type == "cpu":
        return
    if seconds < SHORT:
        row.host = 1e3 * issuing_seconds(contender.run)
    if contender.config is not None:
        row.ranking, row.attention = (1e3 * part for part in parts(kernel_seconds(contender.run)))


def parts(kernels: dict[str, float]) -> tuple[float, float]:
    """Seconds of ranking and of attention, by the names of kernels: what does not attend belongs to the ranking."""
    attending = sum(seconds for name, seconds in kernels.items() if "attend" in name)
    return sum(kernels.values()) - attending, attending


def relative_error(query: torch.Tensor, structure: Structure, is_causal: bool, output: torch.Tensor) -> float:
    """Of `DRAWS` samples of rows of an output [1, Hq, L, D], as many as `LOGITS` allows."""
    call = SparseInputs(
        "", query, structure.key, structure.value, Visibility(is_causal), query.shape[-1] ** -0.5, 0.0, S2OConfig()
    )
    count = max(1, LOGITS // (query.shape[1] * query.shape[2]))
    squares = reduce(torch.add, (sampled_error(call, output, count, draw) for draw in range(DRAWS)))
    wrong, norm = squares.tolist()
    return wrong / norm
