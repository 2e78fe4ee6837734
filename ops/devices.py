"""What kind of device a call runs on, as far as speed depends on it."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from typing import Any

import torch

AMX = "CPU with AMX"
AVX512 = "CPU with bfloat16 instructions"
OTHER_CPU = "CPU without bfloat16 instructions"


@functools.cache
def kind_of(device: torch.device) -> str:
    """One of the kinds of CPU above, or "sm_90" for a GPU of compute capability 9.0, as which an absent one counts."""
    if device.type == "cpu":
        if _capabilities().get("amx_bf16", False):
            return AMX
        return AVX512 if has_fast_bfloat16() else OTHER_CPU
    if device.type != "cuda" or not torch.cuda.is_available():
        return "sm_90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def name_of(device: torch.device) -> str:
    """The model of a device, and of a CPU its kind too, as one name stands for many."""
    if device.type == "cpu":
        return f"{_capabilities().get('cpu_name') or platform.machine()}, {kind_of(device)}"
    return torch.cuda.get_device_name(device) if torch.cuda.is_available() else "no GPU"


@functools.cache
def has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16."""
    return any(_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _capabilities() -> Mapping[str, Any]:
    return torch.cpu.get_capabilities()
