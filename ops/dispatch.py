"""Sparse or dense: chosen on the host, by shape and device alone, without a synchronisation."""

from __future__ import annotations

import dataclasses
import functools

import torch

from .config import S2OConfig
from .sizes import statically_known_true
from .visibility import Visibility

DEFAULT_MIN_LENGTH = {"cpu": 8192, "cuda": 32768}
"""Fewest keys from which the defaults were measured to beat SDPA: docs/decisions/005-when-calls-run-dense.md."""

DENSE_AT_ANY_LENGTH = 2**62
"""A `min_length` that no call reaches."""

SLOW_CPU = "this CPU has no bfloat16 instructions, without which ranking keys takes as long as it saves"


def default_min_length(device: torch.device) -> int:
    """The `min_length` that None stands for."""
    if is_slow(device):
        return DENSE_AT_ANY_LENGTH
    return DEFAULT_MIN_LENGTH.get(device.type, DEFAULT_MIN_LENGTH["cuda"])


def is_slow(device: torch.device) -> bool:
    """Whether the default settings were measured to beat SDPA at no length: on a CPU that ranks in float32."""
    return device.type == "cpu" and not has_fast_bfloat16()


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def has_kernels(visibility: Visibility, config: S2OConfig) -> bool:
    """Whether Triton kernels follow a call's rule; the "gain" rule and block means, which measured worse, have none."""
    config = visibility.effective_config(config)
    return config.ranking.rule != "gain" and not config.has_means


def choose_sparse(queries: int, keys: int, device: torch.device, config: S2OConfig) -> bool | None:
    """Whether a call is worth the sparse path: enough keys, and more queries than would be attended densely anyway.

    `min_length` 0 always takes the sparse path. None where the lengths are symbolic and the answer depends on them.
    """
    least = default_min_length(device) if config.min_length is None else config.min_length
    if least == 0:
        return True
    densely = max(config.last_queries, config.ranking.segment)
    if statically_known_true(keys >= least) and statically_known_true(queries > densely):
        return True
    if least == DENSE_AT_ANY_LENGTH or statically_known_true(keys < least) or statically_known_true(queries <= densely):
        return False
    return None


def why_dense(queries: int, keys: int, device: torch.device, config: S2OConfig) -> str:
    """Why `choose_sparse` is false, and what to do about it."""
    reason = f"{queries} queries over {keys} keys are too few to gain"
    if config.min_length is None and is_slow(device):
        elsewhere = dataclasses.replace(config, min_length=DEFAULT_MIN_LENGTH[device.type])
        if choose_sparse(queries, keys, device, elsewhere) is not False:
            reason = SLOW_CPU
    return f"{reason}; min_length=0 asks for sparse attention at any length"
