"""Tries calls of the operator by seed: against dense attention, and against the specification."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch

from s2o_compile.ops import AttentionResult, S2OConfig
from s2o_compile.ops import dense as dense_attention
from s2o_compile.ops.dispatch import has_kernels
from s2o_compile.ops.memory import DEFAULT_WORKSPACE, limited_workspace
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility
from tests.ops.comparison import allowed_error, dense, largest_difference, seen
from tests.ops.drawing import Call, draw_call, draw_config

from .campaign import Known, Tried, is_known
from .choices import Choices, shrink

SHRINKING = 20.0
"""Seconds for one failure."""
KERNELS = 200
"""Consecutive seeds that share the kernels of a GPU, which take seconds to compile."""
LONGEST = {"cpu": 100, "cuda": 600}


@dataclass(frozen=True)
class Attempt:
    """A call, and in what it is called.

    Attributes:
        call: Sizes, terms and settings.
        dtype: Of query, key and value.
        scale: Factor of the logits.
        path: "sparse", "dense" (too short to be sparse), "maskless" (that, as if it were long) or "dynamic" (chosen
            while it runs).
        poison: What the keys and values hold that `key_padding` hides.
        device: Where.
    """

    call: Call
    dtype: torch.dtype
    scale: float | None
    path: str
    poison: float | None
    device: str

    @property
    def is_exact(self) -> bool:
        """Whether dense attention to rounding is promised."""
        return self.path in ("dense", "maskless") or self.call.config.threshold == 0

    @property
    def features(self) -> frozenset[str]:
        """What a plain call has not."""
        config, default = self.call.config.to_dict(), S2OConfig().to_dict()
        config, default = config | config.pop("ranking"), default | default.pop("ranking")
        found = [
            f"{name}: {value}" for name, value in config.items() if value != default[name] and name != "min_length"
        ]
        names = ("is_causal", "padded", "window", "documents", "mask", "softcap", "sunk")
        found += [name for name in names if getattr(self.call, name) not in (None, False, 0)]
        found += [f"workspace: {self.call.workspace}"] * (self.call.workspace < DEFAULT_WORKSPACE)
        found += [f"layout: {self.call.layout}", f"dtype: {self.dtype}", f"path: {self.path}"]
        found += [f"scale: {self.scale}"] * (self.scale is not None) + ["poisoned"] * (self.poison is not None)
        return frozenset(found + ["empty"] * (0 in (self.call.queries, self.call.keys)))


def draw(choices: Choices, device: str) -> Attempt:
    """A call; on a GPU only sizes and contents are those of its own seed."""
    shared = choices if device == "cpu" or choices.seed is None else Choices(choices.seed // KERNELS)
    config = draw_config(shared)
    call = draw_call(shared, LONGEST[device], config)
    dtype = shared([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    scale = shared([None, None, None, 0.3, 1.0, 0.0, -0.4])
    path = shared(["sparse", "sparse", "sparse", "dense", "dynamic", "maskless"])
    poison = choices([None, None, torch.nan, torch.inf]) if call.padded and path == "sparse" else None
    sizes = range(1, LONGEST[device] + 1)
    queries, keys = (
        choices([choices(sizes), choices([1, 16, 64, 65]), 0 if choices(range(30)) == 29 else 1]) for _ in "qk"
    )
    offset = choices([0, keys - queries, -10, 50])
    batch, seed = choices([*[1, 2, 3] * 10, 0]), choices(range(2**31))
    call = dataclasses.replace(call, queries=queries, keys=keys, offset=offset, batch=batch, seed=seed)
    return Attempt(call, dtype, scale, path, poison, device)


def check(attempt: Attempt) -> tuple[str, str] | None:
    """What is wrong with a call, and by how much."""
    call, arguments = attempt.call, attempt.call.arguments(attempt.device)
    fields = call.config.arguments() | {"min_length": 0 if attempt.path in ("sparse", "dynamic") else None}
    query, key, value = call.tensors(attempt.dtype, attempt.device)
    visibility = call.visibility(attempt.device)
    operator = getattr(torch.ops.s2o, "attention_dynamic" if attempt.path == "dynamic" else "attention")

    def attend(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        large = 0 if attempt.path == "maskless" else dense_attention.LARGE_MASK
        with limited_workspace(call.workspace), patch.object(dense_attention, "LARGE_MASK", large):
            return operator(query, key, value, scale=attempt.scale, **arguments, **fields)

    got = attend(key, value)
    if got.shape != (*query.shape[:3], value.shape[3]) or got.dtype != query.dtype:
        return "shape or dtype", f"{tuple(got.shape)} {got.dtype}"
    if not got.isfinite().all():
        return "not finite", f"{int((~got.isfinite()).sum())} of {got.numel()}"
    if attempt.poison is not None:
        hidden = ~arguments["key_padding"][:, None, :, None]
        if not torch.equal(got, attend(*(x.masked_fill(hidden, attempt.poison) for x in (key, value)))):
            return "hidden keys matter", f"{attempt.poison}"
    mask = seen(query, key, visibility)
    want = dense(query, key, value, mask, attempt.scale, call.softcap, call.sinks(attempt.device))
    if attempt.is_exact:
        error = largest_difference(got, want)
        allowed = 2 * allowed_error(query, key, value, mask, want, attempt.scale)
        return ("values", f"off by {error:.2g}, allowed {allowed:.2g}") if error > allowed else None
    # Outputs are weighted means of values, so that they stay within them.
    if got.numel() and value.numel() and float(got.abs().max()) > 1.01 * float(value.abs().max()) + 1e-3:
        return "beyond all values", f"{float(got.abs().max()):.3g}"
    is_specified = attempt.path == "sparse" and attempt.dtype == torch.float32
    return _against_reference(attempt) if is_specified else None


def _against_reference(attempt: Attempt) -> tuple[str, str] | None:
    """The implementation in float64 (on a GPU in float32) against the specification."""
    call = attempt.call
    tensors = call.tensors(torch.float64, attempt.device)
    visibility, sinks = call.visibility(attempt.device), call.sinks(attempt.device)
    want = reference_attention(
        *tensors, visibility, scale=attempt.scale, softcap=call.softcap, sinks=sinks, config=call.config
    )
    got = _implementation(attempt, visibility, tensors)
    if sinks is None and torch.equal(got.visited, want.visited):
        allowed = 1e-9 if attempt.device == "cpu" else 1e-4
        error = largest_difference(got.output, want.output)
        if error > allowed:
            return "not as specified", f"off by {error:.2g}, allowed {allowed:.2g}"
        return None
    if attempt.device == "cpu" and not torch.equal(got.visited, want.visited):
        return "visits not as specified", f"{int((got.visited - want.visited).abs().max())} pairs"
    return None


def _implementation(attempt: Attempt, visibility: Visibility, tensors: tuple[torch.Tensor, ...]) -> AttentionResult:
    scale = attempt.call.channels**-0.5 if attempt.scale is None else attempt.scale
    options: tuple[Any, ...] = (visibility, scale, attempt.call.softcap, attempt.call.config)
    if any(0 in x.shape for x in tensors):  # The operator asks no implementation then.
        arguments = attempt.call.arguments(attempt.device) | {"sinks": None} | attempt.call.config.arguments()
        return AttentionResult(*torch.ops.s2o.attention_stats(*(x.float() for x in tensors), scale=scale, **arguments))
    with limited_workspace(attempt.call.workspace):
        if attempt.device == "cpu" or not has_kernels(visibility, attempt.call.config):
            from s2o_compile.ops import cpu

            return cpu.sparse_attention(*tensors, *options)
        from s2o_compile.ops.kernels import pipeline

        return pipeline.sparse_attention(*(x.float() for x in tensors), *options)


def _failure(attempt: Attempt) -> tuple[str, str] | None:
    try:
        return check(attempt)
    except Exception as error:
        return type(error).__name__, str(error)[:300]


def attempt(seed: int, known: Known, device: str = "cpu") -> Tried:
    """Check the call of a seed, and shrink it if it fails in a way that is not known."""
    choices = Choices(seed)
    drawn = draw(choices, device)
    found = _failure(drawn)
    counts = [f"feature: {feature}" for feature in drawn.features]
    counts.append("exact" if drawn.is_exact else "sparse")
    if found is None:
        return Tried(seed, "same", counts=counts)
    tried = Tried(seed, found[0], True, found[1], counts)
    if is_known(found[0], drawn.features, known):
        return tried
    least = drawn
    if device == "cpu":
        made = shrink(choices.made, lambda given: (_failure(draw(given, device)) or "")[0:1] == found[:1], SHRINKING)
        least = draw(Choices(given=made), device)
    tried.features, tried.script = sorted(least.features), repr(least)
    return tried
