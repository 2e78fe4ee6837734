"""Launches that overlap: a GPU prepares a kernel while the one before still ends (programmatic dependent launch).

From compute capability 9.0 on. Elsewhere, and where a kernel is launched without `OVERLAPPING`, nothing changes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

_IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_others():
    """Wait until all kernels before have ended, and have the next one prepared: the first thing that a kernel does.

    As each waits for its predecessor, it waits for those before that too. A kernel may be prepared once all programs of
    this one run, so that it takes no room from them.
    """
    if not _IS_INTERPRETED and cuda_capability_geq(9, 0):
        gdc_wait()
        gdc_launch_dependents()


@functools.cache
def overlapping(device: torch.device) -> dict[str, Any]:
    """Triton's option that lets a kernel overlap with the one before it, where a device can."""
    is_cuda = device.type == "cuda" and torch.version.hip is None and not triton.knobs.runtime.interpret
    return {"launch_pdl": True} if is_cuda and torch.cuda.get_device_capability(device) >= (9, 0) else {}
