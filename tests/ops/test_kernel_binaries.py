"""The Triton kernels compile for GPUs, whether or not there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_kernels_compile_for_gpus(dtype: str) -> None:
    """In a process of its own: here they may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.build_kernels", dtype]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    built = run.stdout.split()
    kernels = {"pool_kernel-80", "normaliser_kernel-80", "importance_kernel-90", "select_kernel-90", "attend_kernel-90"}
    assert kernels <= set(built)
    assert ("reach_kernel-90" in built) == ("quantise_kernel-90" in built) == (dtype != "float32")
