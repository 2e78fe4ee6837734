"""Processes that are killed, interrupted or find no place for their caches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

COMPILE = """
import sys, torch
from torch.nn.functional import scaled_dot_product_attention
def attend(x):
    return scaled_dot_product_attention((x * 1.5).sin(), x, x.cos(), is_causal=True)
torch.manual_seed(0)
x = torch.randn(1, 2, 200, 32)
got = torch.compile(attend, backend="s2o", options={"min_length": 0, "threshold": 0.0})(x)
torch.testing.assert_close(got, attend(x))
"""

pytestmark = pytest.mark.slow


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python in a session of its own, as a shell does."""
    return subprocess.Popen(
        [sys.executable, *command], env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def is_left(session: int) -> bool:
    """Whether a process of the session runs."""
    listed = subprocess.run(["ps", "-eo", "sid=,stat="], capture_output=True, text=True, check=True).stdout
    return any(line.split()[0] == str(session) and "Z" not in line.split()[1] for line in listed.splitlines())


@pytest.mark.parametrize("suffix", ["", ".cpp", ".so", ".py"])
def test_a_killed_compilation_leaves_caches_that_work(suffix: str, tmp_path: Path) -> None:
    """Killed as soon as there is a file of that kind in Inductor's cache."""
    killed = start("-c", COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    wait_until(lambda: any(name.is_file() for name in tmp_path.rglob(f"*{suffix}")), killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = start("-c", COMPILE, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    _, errors = again.communicate()
    assert again.returncode == 0, errors


@pytest.mark.parametrize(
    "command",
    [
        ["doctor"],
        ["demo", "--length", "1024", "--output", "output"],
        ["explain", "--length", "1024"],
        ["calibrate", "--length", "1024", "--error-budget", "1e-3", "--output", "calibration.json"],
        ["tune", "--output", "tuned.json"],
        ["view", "--length", "1024", "--output", "report.html"],
        ["bench", "speed", "--length", "8192", "--density", "0.1"],
        ["bench", "quality", "--length", "1024"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_is_stopped(
    number: signal.Signals, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At work, with torch imported: no traceback, no other process left, no half of a file."""
    monkeypatch.chdir(tmp_path)
    process = start("-m", "s2o_compile.cli", *command, PYTHONPATH=str(Path(__file__).parents[2]))
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libtorch_cpu" in maps.read_text(), process)
    time.sleep(4)
    os.killpg(process.pid, number)
    output, errors = process.communicate(timeout=60)
    interrupted = number == signal.SIGINT
    assert process.returncode == (130 if interrupted else -signal.SIGTERM)
    assert output == "" and (errors.splitlines() or [""])[-1] == ("s2o: interrupted." if interrupted else "")
    assert "Traceback" not in errors
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    time.sleep(1)
    assert not is_left(process.pid)
