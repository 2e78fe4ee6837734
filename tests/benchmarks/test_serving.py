"""Long prompts beside requests that decode, on a CPU: each way has a row, and what is called sparse is sparse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.inputs import Structure
from benchmarks.serving.replay import draw_batch
from benchmarks.serving.row import (
    ALONE,
    CONTIGUOUS,
    DENSE,
    ENGINE,
    REPLAY,
    S2O,
    STOCK,
    VARLEN,
    Row,
    compare,
)
from s2o_compile import cli
from s2o_compile.ops import S2OConfig

from .test_prefill import tiny

LOAD = "s2o_compile.benchmarks.serving.__main__.load"
BATCH = ["--budget", "128", "--neighbours", "3", "--context", "100", "--density", "0.5", "--s2o", "min_length=200"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "serving", "--device", "cpu", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    code, printed, errors = run(capsys, *BATCH, *arguments, "--json")
    assert code == 0, errors
    rows: list[dict[str, Any]] = json.loads(printed)["rows"]
    return rows


def test_the_engine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
    monkeypatch.setattr(LOAD, lambda *_: tiny(2))
    options = ["--part", ENGINE, "--length", "400", "--page", "16", "--repetitions", "2", "--steps", "4"]
    rows = measured(capsys, *options, "--output", str(tmp_path))
    assert json.loads((tmp_path / "serving.json").read_text())["rows"] == rows
    assert [(row["subject"], row["way"], row["keys"]) for row in rows] == [
        (ALONE, STOCK, "sdpa"),
        (ALONE, S2O, "s2o"),
        (ENGINE, STOCK, "sdpa"),
        (ENGINE, DENSE, "s2o"),
        (ENGINE, S2O, "s2o"),
    ]
    assert not any(row["reason"] for row in rows)
    # Of each layer: once of the whole, and of the parts that end beyond 200 keys: 125 tokens each, and 25.
    assert [row["sparse"] for row in rows] == [0, 2, 0, 0, 4]
    alone, engine = rows[:2], rows[2:]
    assert all(row["seconds"] > 0 and row["step"] is None for row in alone)
    assert all(row["seconds"] > row["step"] > 0 for row in engine)
    assert alone[1]["gain"] == pytest.approx(alone[0]["seconds"] / alone[1]["seconds"])
    assert engine[2]["gain"] == pytest.approx(min(row["seconds"] for row in engine[:2]) / engine[2]["seconds"])
    assert engine[2]["of_alone"] == pytest.approx(engine[2]["gain"] / alone[1]["gain"])
    assert engine[2]["to_stock"] == pytest.approx(engine[2]["step"] / engine[0]["step"])


def test_an_engine_that_refuses_says_why(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    integration = pytest.importorskip("s2o_compile.integrations.continuous_batching")
    monkeypatch.setattr(integration, "_IS_SUPPORTED", False)
    monkeypatch.setattr(LOAD, lambda *_: tiny(1))
    options = ["--part", ENGINE, "--only", S2O, "--length", "300", "--repetitions", "1", "--steps", "2"]
    code, printed, errors = run(capsys, *BATCH, *options)
    assert code == 0, errors
    assert "needs transformers 5.19 or later" in " ".join(printed.split())


def test_a_replay(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--part", REPLAY, "--length", "300", "--shape", "smollm2", "--pages", "16", "--repetitions", "1"]
    rows = measured(capsys, *options)
    assert [(row["keys"], row["way"]) for row in rows] == [
        (keys, way) for keys in (CONTIGUOUS, "16") for way in (VARLEN, DENSE, S2O)
    ]
    assert [row["sparse"] for row in rows] == [None, 0, 1, None, 0, 1]
    whole, pages = rows[2], rows[5]
    assert pages["to_contiguous"] == pytest.approx(pages["seconds"] / whole["seconds"])
    assert pages["gain"] == pytest.approx(rows[1]["seconds"] / pages["seconds"])
    assert rows[0]["reason"] == "PyTorch has it on GPUs alone"


@pytest.mark.parametrize("size", [16, 64, 256])
def test_pages_hold_the_same_keys(size: int) -> None:
    whole = draw_batch(Structure.draw(300, 4, 2, 16), 0.5, 3, 100, 60)
    assert whole.query.shape == (63, 4, 16) and whole.key.shape == (600, 2, 16)
    pages = whole.in_pages(size)
    assert pages.key.shape[1:] == (size, 2, 16)
    config = S2OConfig(min_length=200)
    assert torch.equal(pages.attend(config), whole.attend(config))


@pytest.mark.parametrize(("length", "budget"), [("64", "160"), ("300", "103")])
def test_a_replay_of_fewer_queries_than_neighbours(
    length: str, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--part", REPLAY, "--length", length, "--budget", budget, "--neighbours", "100", "--context", "20"]
    rows = measured(capsys, *options, "--shape", "smollm2", "--pages", "16", "--repetitions", "1")
    assert [row["reason"] for row in rows if row["way"] != VARLEN] == [""] * 4


def test_what_failed_is_compared_with_nothing() -> None:
    rows = [
        Row(ALONE, 9, STOCK, seconds=6.0),
        Row(ALONE, 9, S2O, seconds=2.0),
        Row(ENGINE, 9, STOCK, reason="no"),
        Row(ENGINE, 9, S2O, seconds=2.0, step=1.0),
    ]
    compare(rows)
    assert [row.gain for row in rows] == [1, 3, None, None]
    assert rows[3].of_alone is None and rows[3].to_stock is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "vllm"], "--part must be one of 'engine', 'replay', not 'vllm'."),
        (["--only", "sdpa"], "--only must be one of 'stock', 's2o, kept dense', 's2o', not 'sdpa'."),
        (["--shape", "gpt"], "--shape must be one of"),
        (["--density", "1"], "--density must be between 0 and 1, not 1.0."),
        (["--budget", "16"], "--budget must be above --neighbours (16), not 16."),
        (["./no/model", "--length", "2048"], "The model ./no/model cannot be loaded: "),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(capsys, *arguments)
    assert code == 2 and not printed and message in errors
