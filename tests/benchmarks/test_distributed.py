"""The benchmark of sequences over several ranks, on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.distributed.ranks import on_ranks
from s2o_compile import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "distributed", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")


def test_the_operator(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--shape", "smollm2", "--length", "512", "--density", "0.3", "--repetitions", "1"]
    code, printed, errors = run(capsys, *options, "--json", "--output", str(tmp_path))
    assert code == 0, errors
    result = json.loads(printed)
    assert json.loads((tmp_path / "distributed.json").read_text()) == result
    one, two = result["rows"]
    assert (one["ranks"], one["layout"], two["ranks"], two["layout"]) == (1, "", 2, "head-tail")
    assert not one["reason"] and not two["reason"]
    assert one["seconds"] > 0 and one["exposed"] is None and one["difference"] is None
    assert two["gather"] > 0 and two["attention"] > 0 and two["speedup"] > 0
    assert two["exposed"] == pytest.approx(two["seconds"] - two["attention"])
    assert two["received"] * 2**30 == 2 * 3 * 256 * 64 * 4
    assert 1 <= two["balance"] < 2 and 1 <= two["visited"] < 1.5
    # Draws may be others, and so may channels be.
    assert two["density"] == pytest.approx(one["density"], rel=0.1) and two["difference"] < 0.1


def test_heads_over_ranks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--shape", "llama-3.2-1b", "--length", "128", "--density", "0.8", "--repetitions", "1"]
    code, printed, errors = run(capsys, *options, "--layout", "heads", "--json")
    assert code == 0, errors
    one, two = json.loads(printed)["rows"]
    assert (one["layout"], two["layout"], two["ranks"]) == ("", "heads", 2) and not two["reason"]
    assert two["seconds"] > 0 and two["speedup"] > 0 and 1 <= two["balance"] < 2
    assert two["density"] == one["density"] and two["difference"] < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "130"], "--length must be a multiple of twice the --ranks, not 130."),
        (
            ["--length", "128", "--layout", "zigzag"],
            "--layout must be one of 'head-tail', 'contiguous', 'heads', not 'zigzag'.",
        ),
        (
            ["--length", "128", "--layout", "heads", "--shape", "smollm2"],
            "--ranks must divide the 3 KV heads of smollm2, not be 2.",
        ),
        (
            ["--length", "128", "--layout", "heads", "--subject", "smollm2"],
            "--layout heads is of the operator alone, not of smollm2.",
        ),
        (["--length", "128", "--shape", "gpt"], "--shape must be one of"),
        (["--length", "128", "--density", "1"], "--density must be between 0 and 1, not 1.0."),
        (["--length", "128", "--subject", "./no/model"], "The model ./no/model cannot be loaded: "),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(capsys, *arguments)
    assert code == 2 and not printed and message in errors


def fail() -> None:
    raise ValueError("what went wrong")


def test_a_rank_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"^ValueError: what went wrong$"):
        on_ranks(1, "cpu", fail)


@pytest.mark.slow
def test_a_prefill(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--subject", "smollm2", "--length", "1024", "--repetitions", "1", "--s2o", "min_length=0 threshold=0"]
    code, printed, errors = run(capsys, *options, "--json")
    assert code == 0, errors
    one, two = json.loads(printed)["rows"]
    assert not one["reason"] and not two["reason"]
    assert one["seconds"] > 0 and two["seconds"] > 0 and two["difference"] < 1e-6
