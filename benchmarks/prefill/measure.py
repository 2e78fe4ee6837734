"""One length: the model compiled both ways, prefilled in turn."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2o_compile.backend import s2o
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH

from ..timing import (
    Run,
    first_line,
    interleaved,
    kernel_seconds,
    median_and_spread,
    settled,
    wall_seconds,
    warm_up,
    with_peak_memory,
)
from .budget import visited_density, with_density

ATTENTION_KERNELS = re.compile(
    "^(?!triton_).*(flash|fmha|sdpa|(pool|means|reach|sample|select)_kernel|quantise|normaliser|importance|attend)"
)
"""Names of the kernels that count as attention; what Inductor fuses (triton_...) does not."""
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass
class Row:
    """Prefills of one length by one backend.

    Attributes:
        length: Tokens.
        backend: "inductor", "inductor, cuDNN" (the same where SDPA prefers cuDNN; on a GPU only), "s2o, kept dense"
            (masks are proven away, nothing is left out; on a GPU only) or "s2o".
        seconds: To the first token on the host, the median.
        spread: Range of the repetitions over their median.
        speedup: Time of the fastest without sparse attention over its own.
        attention: Share of the GPU's time that is attention, by the names of kernels; None on a CPU.
        mebibytes: Memory at its peak beside the weights, with the cache; None on a CPU.
        density: Visited pairs over those that dense kernels visit, over all layers.
        threshold: Of the operator; None without it.
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
    row = Row(tokens.shape[1], "s2o")
    rows = []
    try:
        if density is not None:
            progress("threshold")
            config = with_density(model, inputs, config, density)
        progress("density")
        row.density, row.threshold = visited_density(model, inputs, config), config.threshold
        runs: dict[str, Run] = {name: partial(run, inputs) for name, run in compiled(model, config).items()}
        rows = [row if name == "s2o" else Row(row.length, name, density=1.0) for name in runs]
        _time(runs, rows, model.device, repetitions, progress)
    except torch.OutOfMemoryError as error:
        rows = rows or [row]
        for each in rows:
            each.reason = each.reason or first_line(error)
    return rows


def compiled(model: Any, config: S2OConfig) -> dict[str, Callable[[dict[str, Any]], int]]:
    """Functions of a model's inputs that give the first token, by the names of backends."""
    runs: dict[str, Callable[[dict[str, Any]], int]] = {
        "inductor": partial(first_token, torch.compile(model, backend="inductor")),
        "s2o": partial(first_token, torch.compile(model, backend=s2o.with_config(config))),
    }
    if model.device.type == "cpu":
        return runs

    dense = dataclasses.replace(config, min_length=DENSE_AT_ANY_LENGTH)
    kept_dense = partial(first_token, torch.compile(model, backend=s2o.with_config(dense)))
    return {"inductor, cuDNN": preferring(CUDNN_FIRST, model), "s2o, kept dense": kept_dense, **runs}


def preferring(backends: list[SDPBackend], model: Any) -> Callable[[dict[str, Any]], int]:
    """`first_token` of a model that Inductor compiles while SDPA prefers these backends, the first most."""
    # The option is Inductor's default: it only keeps Dynamo from reusing what it compiled without a preference.
    compiled_model = torch.compile(model, backend="inductor", options={"max_autotune": False})

    def first(inputs: dict[str, Any]) -> int:
        # Caches of compilations do not know the preference: without a tag of its own, later ones would take over this.
        tag = torch.compiler.config.patch(cache_key_tag=f"prefers {backends}")  # type: ignore[attr-defined]
        with tag, sdpa_kernel(backends, set_priority=True):
            return first_token(compiled_model, inputs)

    return first


def _time(
    runs: dict[str, Run], rows: list[Row], device: torch.device, repetitions: int, progress: Callable[[str], None]
) -> None:
    """Fill in what is measured of compiled prefills."""
    for row in rows:
        progress(f"compiling with {row.backend}")
        row.reason = warm_up(runs[row.backend])
    running = [row for row in rows if not row.reason]
    progress("repetitions")
    clock = wall_seconds if device.type == "cpu" else settled(wall_seconds)
    times = interleaved({row.backend: runs[row.backend] for row in running}, repetitions, clock)
    for row in running:
        row.seconds, row.spread = median_and_spread(times[row.backend])
        _, size = with_peak_memory(runs[row.backend], device)
        row.mebibytes = None if size is None else size / 2**20
        if device.type != "cpu":
            row.attention = attention_share(kernel_seconds(runs[row.backend]))
    dense = [row.seconds for row in running if row.seconds and row.backend != "s2o"]
    for row in running:
        if row.seconds and dense:
            row.speedup = min(dense) / row.seconds


@torch.no_grad()
def first_token(model: Any, inputs: dict[str, Any]) -> int:
    """The most likely next token, on the host."""
    return int(model(**inputs).logits[0, -1].argmax())


def attention_share(kernels: dict[str, float]) -> float:
    """The part of the seconds of kernels, by name, that is attention."""
    attention = sum(seconds for name, seconds in kernels.items() if ATTENTION_KERNELS.search(name))
    return attention / sum(kernels.values())
