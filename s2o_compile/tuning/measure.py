"""Times sparse attention beside the fastest dense attention, the host's part included."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from .._attention import attention
from ..ops import S2OConfig
from ..ops.dispatch import DENSE_AT_ANY_LENGTH
from ..timing import Run, attempt, idle_seconds, interleaved, wall_seconds
from .cases import Case

REPEATS = 3
LONG = 0.05
"""Seconds from which a call is timed once."""

_TOPIC = 256
_SHARPNESS = 5.3
_OWN = 0.2
_WEAK = 0.3


@dataclass(frozen=True)
class Row:
    """A call, timed.

    Attributes:
        case: The call.
        dense: Seconds of the fastest dense attention; None if none ran.
        by: Its name.
        sparse: Seconds of the default, forced to be sparse; None if it did not run.
        reason: Why one of them did not run.
    """

    case: Case
    dense: float | None
    by: str
    sparse: float | None
    reason: str = ""

    @property
    def ratio(self) -> float | None:
        """Seconds of dense attention over those of sparse attention; None if one is missing."""
        return self.dense / self.sparse if self.dense and self.sparse else None


def measure(case: Case, device: torch.device, dtype: torch.dtype) -> Row:
    """Time one call."""
    tensors, reason = attempt(lambda: draw(case, device, dtype))
    if tensors is None:
        return Row(case, None, "", None, reason)
    clock = wall_seconds if device.type == "cpu" else idle_seconds
    dense = dict(_dense(case, tensors))
    first = {name: _first_seconds(run, clock)[0] or math.inf for name, run in dense.items()}
    fastest = min(first, key=lambda name: first[name])
    runs = {fastest: dense[fastest], "sparse": _operator(case, tensors, S2OConfig(min_length=0))}
    warm = {name: _first_seconds(run, clock) for name, run in runs.items()}
    ran = {name: run for name, run in runs.items() if warm[name][0] is not None}
    is_long = any(seconds is not None and seconds > LONG for seconds, _ in warm.values())
    times = interleaved(ran, 1 if is_long else REPEATS, clock)
    medians = {name: statistics.median(found) for name, found in times.items()}
    reason = next((reason for _, reason in warm.values() if reason), "")
    return Row(case, medians.get(fastest), fastest if fastest in medians else "", medians.get("sparse"), reason)


def _first_seconds(run: Run, clock: Callable[[Run], float]) -> tuple[float | None, str]:
    """Of a call that is compiled by then, and ""; or None and why it does not run."""

    def seconds() -> float:
        run()
        return clock(run)

    return attempt(seconds)


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value that attend as models do: topics that queries share, and few channels that say most.

    Standard normal, but that half of the channels of query and key are weak, and that a query is mostly the topic of
    256 positions and its KV head, sharp enough that a tenth of 8,192 keys is visited, and less of more.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, case.channels, generator=generator, device=device, dtype=dtype)

    _, key_shape, _ = case.shapes
    topics = normal(case.batch, case.kv_heads, 1, -(-case.queries // _TOPIC))
    own = normal(case.batch, case.kv_heads, case.heads // case.kv_heads, case.queries)
    weights = torch.ones(case.channels, device=device, dtype=dtype)
    weights[case.channels // 2 :] = _WEAK
    topic = torch.arange(case.queries, device=device) // _TOPIC
    query = topics[:, :, :, topic] * (1 - _OWN) ** 0.5 + own * _OWN**0.5
    sharpness = _SHARPNESS / (weights**4).mean().sqrt()
    return (query * (weights * sharpness)).flatten(1, 2), normal(*key_shape[:3]) * weights, normal(*key_shape[:3])


def _operator(case: Case, tensors: tuple[torch.Tensor, ...], config: S2OConfig) -> Run:
    query, key, value = tensors
    terms = case.terms
    return lambda: attention(
        query, key, value, True, causal_offset=terms.causal_offset, window=terms.window, config=config
    )


def _dense(case: Case, tensors: tuple[torch.Tensor, ...]) -> list[tuple[str, Run]]:
    """The ways to attend to every key that a query sees."""
    if case.window is None and case.queries == case.keys:
        return [(name, _by(backend, tensors)) for name, backend in _backends(tensors[0].device).items()]
    return [("s2o, dense", _operator(case, tensors, S2OConfig(min_length=DENSE_AT_ANY_LENGTH)))]


def _backends(device: torch.device) -> dict[str, SDPBackend | None]:
    """The backends of SDPA by name; None is whichever it chooses."""
    if device.type == "cpu":
        return {"SDPA": None}
    return {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention": SDPBackend.FLASH_ATTENTION, "SDPA": None}


def _by(backend: SDPBackend | None, tensors: tuple[torch.Tensor, ...]) -> Run:
    query, key, value = tensors

    def run() -> torch.Tensor:
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return run
