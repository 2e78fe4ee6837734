"""Long runs: counted, continued, and not ended by what ends a process."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

from .campaign import CHUNK, Known, Result, Tried, is_known, run


def attempt(seed: int, known: Known) -> Tried:
    """Odd seeds fail in one way, and seed 4 ends the process."""
    if seed == 4:
        os._exit(3)
    if seed % 2 == 0:
        return Tried(seed, "same", counts=["even"])
    script = "" if is_known("odd", frozenset({"a", "b"}), known) else "print()"
    return Tried(seed, "odd", True, features=["a"], script=script)


def test_faults_are_counted_once_and_a_dead_process_is_one(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result = run(attempt, Result(0, 0), 0.5, path)
    assert [(fault.kind, fault.seed) for fault in result.faults] == [("odd", 1), ("dies", 4)]
    assert "exit code 3" in result.faults[1].message
    assert result.counts["faulty"] > 2 and result.counts["even"] > CHUNK // 2
    saved = Result.load(path)
    assert saved == result
    assert run(attempt, saved, 0.5, None).counts["tried"] > result.counts["tried"] - 1


def test_a_hanging_process_is_a_fault() -> None:
    result = run(lambda seed, known: _hang(), Result(0, 0), 0.1, None, patience=0.2)
    assert [fault.kind for fault in result.faults] == ["hangs"]
    assert multiprocessing.active_children() == []


def _hang() -> Tried:
    while True:
        os.sched_yield()
