"""One length: the model run in each way, called in each way, prefilled in turn."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from s2o_compile.ops import S2OConfig
from s2o_compile.timing import (
    Run,
    attempt,
    first_line,
    interleaved,
    kernel_seconds,
    median_and_spread,
    settled,
    wall_seconds,
    with_peak_memory,
)

from .backends import EAGER, EAGER_S2O, NO_ATTENTION, S2O, UNCOMPILED, Contender, Contenders
from .budget import visited_density, with_density
from .calls import Call, prefill_inputs

ATTENTION_KERNELS = re.compile(
    "^(?!triton_).*(flash|fmha|sdpa|(pool|means|reach|sample|select)_kernel|quantise|normaliser|importance|attend)"
)
"""Names of the kernels that count as attention; what Inductor fuses (triton_...) does not."""
RECOMPILE_LIMIT = 256


@dataclass
class Row:
    """Prefills of one length, called in one way, by one backend.

    Attributes:
        length: Tokens, of the longest prompt.
        call: How the model is called: `Call.name`.
        backend: "eager" (not compiled), "inductor", "inductor, one length" (where the others are compiled for all),
            "s2o, kept dense" (masks are proven away, nothing is left out), "s2o", or another of `backends.UNCOMPILED`.
        seconds: To the first token on the host, the median.
        spread: Range of the repetitions over their median.
        to_eager: Time of eager, called in the same way, over its own; None without eager.
        attention: Share of the GPU's time that is attention, by the names of kernels; None on a CPU, or not profiled.
        attention_seconds: What is not compiled takes longer than without attention; None where that was not timed.
        mebibytes: Memory at its peak beside the weights, with the cache; None on a CPU.
        compile_seconds: What the first prefill of this length took longer than the median; None where nothing is
            compiled.
        sites: What s2o made of the attention sites.
        density: Visited pairs over those that dense kernels visit, over all layers; None where it was not counted.
        threshold: Of the operator; None without it.
        reason: Why it could not run; empty where it did.
    """

    length: int
    call: str
    backend: str
    seconds: float | None = None
    spread: float | None = None
    to_eager: float | None = None
    attention: float | None = None
    attention_seconds: float | None = None
    mebibytes: float | None = None
    compile_seconds: float | None = None
    sites: str = ""
    density: float | None = None
    threshold: float | None = None
    reason: str = ""


def measure(
    contenders: Contenders,
    tokens: torch.Tensor,
    calls: Sequence[Call],
    config: S2OConfig,
    density: float | None,
    repetitions: int,
    profiled: bool,
    progress: Callable[[str], None],
) -> list[Row]:
    """Prefill in each way; those that fail, as they run out of memory, leave the others alone.

    Args:
        contenders: A causal language model of transformers, and the ways to run it.
        tokens: [1, L], for which the threshold is chosen and the density counted.
        calls: The ways to call the model.
        config: Settings of the operator.
        density: What the operator is to visit, by its threshold; None to leave the threshold as it is.
        repetitions: Timed prefills of each.
        profiled: Whether attention's share is measured, on a GPU, which takes a prefill more of each.
        progress: Called with the name of each step.
    """
    contenders.begin_length()
    model, length = contenders.model, tokens.shape[1]
    asked = {f"{backend}, {call.name}": (backend, call) for call in calls for backend in contenders.backends}
    rows = {name: Row(length, call.name, backend) for name, (backend, call) in asked.items()}
    try:
        config, visited = _budget(model, tokens, config, density, progress)
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            runs = {name: (contenders.get(backend, call, config), call) for name, (backend, call) in asked.items()}
            _time(runs, rows, model.device, repetitions, profiled, progress)
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.reason = row.reason or first_line(error)
        return list(rows.values())
    for name, (backend, call) in asked.items():
        is_sparse = backend in (S2O, EAGER_S2O)
        if is_sparse:
            rows[name].threshold = config.threshold
        is_whole = call.inputs[0]["input_ids"].shape == tokens.shape and not call.is_dynamic
        if is_whole and backend != NO_ATTENTION:
            rows[name].density = visited if is_sparse else 1.0
    _compare(rows.values())
    return list(rows.values())


def _budget(
    model: Any, tokens: torch.Tensor, config: S2OConfig, density: float | None, progress: Callable[[str], None]
) -> tuple[S2OConfig, float]:
    """The settings, with the threshold for a density if one is given, and the density that they visit."""
    inputs = prefill_inputs(tokens, None)
    if density is not None:
        progress("threshold")
        config = with_density(model, inputs, config, density)
    progress("density")
    return config, visited_density(model, inputs, config)


def _time(
    runs: dict[str, tuple[Contender, Call]],
    rows: dict[str, Row],
    device: torch.device,
    repetitions: int,
    profiled: bool,
    progress: Callable[[str], None],
) -> None:
    """Fill in what is measured of each contender's prefills into the row of its name."""
    first: dict[str, float] = {}
    running: dict[str, Run] = {}
    for name, (contender, call) in runs.items():
        progress(f"warming up {name}")
        row = rows[name]
        running[name] = partial(contender, call)
        first[name], row.mebibytes, row.reason = _warm_up(running[name], device)
        row.sites = contender.sites
        if row.reason:
            del running[name]
    progress("repetitions")
    clock = wall_seconds if device.type == "cpu" else settled(wall_seconds)
    times = interleaved(running, repetitions, clock)
    for name, run in running.items():
        row = rows[name]
        row.seconds, row.spread = median_and_spread(times[name])
        row.compile_seconds = None if row.backend in UNCOMPILED else max(0.0, first[name] - row.seconds)
        if profiled and device.type != "cpu":
            progress(f"profiling {name}")
            row.attention = attention_share(kernel_seconds(run))


def _warm_up(run: Run, device: torch.device) -> tuple[float, float | None, str]:
    """Call something twice: seconds of the first call, MiB at the peak of the second, and why it failed, or ""."""
    seconds, failure = attempt(partial(wall_seconds, run))
    measured, failure = (None, failure) if failure else attempt(partial(with_peak_memory, run, device))
    if failure and device.type == "cuda":
        # Frames of the error may be in cycles, and hold what was allocated.
        gc.collect()
        torch.cuda.empty_cache()
    size = measured[1] if measured else None
    return seconds or 0.0, None if size is None else size / 2**20, failure


def _compare(rows: Iterable[Row]) -> None:
    """Fill in the times relative to those of eager and of no attention, called in the same way, where they have any."""
    seconds = {(row.call, row.backend): row.seconds for row in rows}
    for row in rows:
        eager, nothing = (seconds.get((row.call, backend)) for backend in (EAGER, NO_ATTENTION))
        if row.seconds and eager:
            row.to_eager = eager / row.seconds
        if row.seconds and nothing and row.backend in UNCOMPILED and row.backend != NO_ATTENTION:
            row.attention_seconds = row.seconds - nothing


def attention_share(kernels: dict[str, float]) -> float:
    """The part of the seconds of kernels, by name, that is attention."""
    attention = sum(seconds for name, seconds in kernels.items() if ATTENTION_KERNELS.search(name))
    return attention / sum(kernels.values())
