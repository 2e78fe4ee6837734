"""One length: the model compiled both ways, prefilled in turn."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from s2o_compile.backend import s2o
from s2o_compile.ops import S2OConfig

from ..timing import (
    Run,
    failure,
    first_line,
    interleaved,
    kernel_seconds,
    median_and_spread,
    wall_seconds,
    with_peak_memory,
)
from .budget import visited_density, with_density

ATTENTION_KERNELS = re.compile("flash|fmha|sdpa|importance|normaliser|select_kernel|quantise|attend")
"""Names of the kernels that count as attention; what Inductor fuses of guides and their pooling does not."""


@dataclass
class Row:
    """Prefills of one length by one backend.

    Attributes:
        length: Tokens.
        backend: "inductor" or "s2o".
        seconds: To the first token on the host, the median.
        spread: Range of the repetitions over their median.
        speedup: Time of Inductor alone over its own.
        attention: Share of the GPU's time that is attention, by the names of kernels; None on a CPU.
        mebibytes: Memory at its peak beside the weights, with the cache; None on a CPU.
        density: Visited pairs over those that dense kernels visit, over all layers.
        threshold: Of the operator; None for Inductor alone.
        reason: Why it could not run; empty where it did.
    """

    length: int
    backend: str
    seconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    attention: float | None = None
    mebibytes: float | None = None
    density: float | None = None
    threshold: float | None = None
    reason: str = ""


def measure(
    model: Any,
    tokens: torch.Tensor,
    config: S2OConfig,
    density: float | None,
    repetitions: int,
    progress: Callable[[str], None],
) -> list[Row]:
    """Prefill tokens with Inductor alone and with sparse attention.

    Args:
        model: A causal language model of transformers.
        tokens: [1, L].
        config: Settings of the operator.
        density: What the operator is to visit, by its threshold; None to leave the threshold as it is.
        repetitions: Timed prefills of each.
        progress: Called with the name of each step.
    """
    torch.compiler.reset()
    inputs = {"input_ids": tokens, "use_cache": True, "logits_to_keep": 1}
    length = tokens.shape[1]
    rows = {"inductor": Row(length, "inductor", density=1.0), "s2o": Row(length, "s2o")}
    try:
        if density is not None:
            progress("threshold")
            config = with_density(model, inputs, config, density)
        progress("density")
        rows["s2o"].density, rows["s2o"].threshold = visited_density(model, inputs, config), config.threshold
        _time(model, inputs, config, rows, repetitions, progress)
    except torch.OutOfMemoryError as error:
        for row in rows.values():
            row.reason = row.reason or first_line(error)
    return list(rows.values())


def _time(
    model: Any,
    inputs: dict[str, Any],
    config: S2OConfig,
    rows: dict[str, Row],
    repetitions: int,
    progress: Callable[[str], None],
) -> None:
    """Fill in what is measured of compiled prefills."""
    runs: dict[str, Run] = {}
    for name, backend in (("inductor", "inductor"), ("s2o", s2o.with_config(config))):
        progress(f"compiling with {name}")
        run = partial(first_token, torch.compile(model, backend=backend), inputs)
        rows[name].reason = failure(run)
        if not rows[name].reason:
            runs[name] = run
    progress("repetitions")
    for name, times in interleaved(runs, repetitions, wall_seconds).items():
        row = rows[name]
        row.seconds, row.spread = median_and_spread(times)
        _, size = with_peak_memory(runs[name], model.device)
        row.mebibytes = None if size is None else size / 2**20
        if model.device.type != "cpu":
            row.attention = attention_share(kernel_seconds(runs[name]))
    dense = rows["inductor"].seconds
    for row in rows.values():
        if row.seconds and dense:
            row.speedup = dense / row.seconds


@torch.no_grad()
def first_token(model: Any, inputs: dict[str, Any]) -> int:
    """The most likely next token, on the host."""
    return int(model(**inputs).logits[0, -1].argmax())


def attention_share(kernels: dict[str, float]) -> float:
    """The part of the seconds of kernels, by name, that is attention."""
    attention = sum(seconds for name, seconds in kernels.items() if ATTENTION_KERNELS.search(name))
    return attention / sum(kernels.values())
