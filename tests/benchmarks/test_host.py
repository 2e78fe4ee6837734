"""The benchmark of the host's part: every way to call attention has a row, and the sparse ones launch kernels."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import host
from benchmarks.command import run


def test_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["host"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run(host.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "benchmarks.host needs a CUDA device.\n"


@pytest.mark.gpu
def test_every_way_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    torch.compiler.reset()
    monkeypatch.setattr(sys, "argv", ["host", "--length", "1024", "--repetitions", "2", "--json"])
    with pytest.raises(SystemExit) as stop:
        run(host.main)
    assert stop.value.code == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == list(host.contenders())
    assert all(row["host"] > 0 for row in rows.values())
    # One kernel that attends, and some that rank.
    assert rows["SDPA"]["kernels"] < 4 < rows["sparse"]["kernels"] < 15
    for name in ("sparse, compiled", "sparse, layers compiled"):
        assert rows[name]["kernels"] == rows["sparse"]["kernels"]
