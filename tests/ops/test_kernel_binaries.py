"""The Triton kernels compile for GPUs, whether or not there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PLAIN = {"normaliser_kernel", "importance_kernel", "sample_kernel", "attend_kernel"}
WITH_FLOAT8 = {
    "pool_kernel", "select_kernel", "reach_kernel", "quantise_kernel", "moments_kernel", "choose_kernel"
}  # fmt: skip


@pytest.mark.parametrize("calls", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("dtype", "capability"), [("float16", 80), ("float32", 89), ("bfloat16", 90)])
def test_kernels_compile_for_gpus(dtype: str, capability: int, calls: str) -> None:
    """In a process of its own: here they may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.build_kernels", dtype, str(capability), calls]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(run.stdout.split()) == PLAIN | (WITH_FLOAT8 if dtype == "bfloat16" else set())
