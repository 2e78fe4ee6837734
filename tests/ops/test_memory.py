"""Calls for which memory does not suffice."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from s2o_compile.ops import AttentionResult, S2OConfig, memory
from s2o_compile.ops.memory import fit_into_memory

from .starve import outcomes


def test_less_memory_means_less_workspace_then_dense_attention_then_an_error_on_a_cpu() -> None:
    # Memory that is given up goes back to the system.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.ops.starve"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [name for name, _ in itertools.groupby(json.loads(run.stdout))]
    assert found[:2] + found[-2:] == ["error", "dense", str(2**23), str(2**26)]


@pytest.mark.gpu
def test_less_memory_means_less_workspace_then_dense_attention_then_an_error_on_a_gpu() -> None:
    total = torch.cuda.get_device_properties(0).total_memory

    def limit(room: int | None) -> None:
        torch.cuda.empty_cache()
        share = 1.0 if room is None else (torch.cuda.memory_reserved() + room) / total
        torch.cuda.set_per_process_memory_fraction(share)

    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 16384, 64, device="cuda", dtype=torch.bfloat16) for heads in (16, 8, 8)]
    found = outcomes(inputs, (2**28, 2**25, 2**22), limit, range(0, 500 * 2**20, 2**23))
    found = [name for name, _ in itertools.groupby(found)]
    assert found == ["error", "dense", str(2**22), str(2**25), str(2**28)]


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("mat1 and mat2 shapes cannot be multiplied")])
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    calls = []

    def attend(config: S2OConfig) -> AttentionResult:
        calls.append(config)
        raise error

    with pytest.raises(type(error), match=str(error)):
        fit_into_memory(attend, S2OConfig())
    assert calls == [S2OConfig()]


@pytest.mark.parametrize("text", ["", "1GB", "0", "-5", "1e9", "2**30", "١"])
def test_a_workspace_that_is_no_number_of_bytes_is_one_sentence(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2O_WORKSPACE", text)
    sentence = f"the environment variable S2O_WORKSPACE must be a whole number of bytes above 0, not {text!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        torch.ops.s2o.attention(*torch.randn(3, 1, 1, 100, 16), min_length=0)


def test_the_workspace_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S2O_WORKSPACE", raising=False)
    assert memory.workspace() == 2**30
    monkeypatch.setenv("S2O_WORKSPACE", "4096")
    assert memory.workspace() == 4096
    with memory.limited_workspace(2**20):
        assert memory.workspace() == 2**20
    assert memory.workspace() == 4096
