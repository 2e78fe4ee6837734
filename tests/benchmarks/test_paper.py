"""The paper's claims beside what is measured: curves read at the baseline's density and error, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.captured import Layer, save_layer
from benchmarks.inputs import Structure
from benchmarks.judge import Score
from benchmarks.paper import __main__ as command
from benchmarks.paper import times
from benchmarks.paper.claims import CLAIMED, SETTINGS, Row, table
from benchmarks.paper.layers import at_equal_density, at_equal_error
from benchmarks.prefill.backends import EAGER, INDUCTOR, S2O
from benchmarks.prefill.measure import Row as Prefill
from benchmarks.prefill.models import Subject
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig

from ..passes.models import VOCABULARY, tiny
from .test_quality import Characters


def score(density: float, error: float) -> Score:
    return Score(density, ranking=0.1, error=error, row_999=0, row_max=0, lse_error=0)


SWEEP = [score(0.8, 1e-6), score(0.4, 1e-4), score(0.1, 1e-2)]


def test_curves_are_read_at_the_baseline() -> None:
    row = at_equal_density(SWEEP, score(0.4, 5e-4), "layer", "fastest")
    assert row.ratio == pytest.approx(5) and row.error == pytest.approx(1e-4) and row.density == 0.4
    row = at_equal_error(SWEEP, score(0.7, 1e-4), "layer", "fastest")
    assert row.ratio == pytest.approx(0.7 / 0.4) and row.density == pytest.approx(0.4) and not row.bound
    assert row.work == pytest.approx(0.5)
    between = at_equal_error(SWEEP, score(0.7, 1e-3), "layer", "fastest")
    assert between.density == pytest.approx(0.2)


def test_ends_of_a_sweep_are_bounds() -> None:
    row = at_equal_density(SWEEP, score(0.9, 5e-4), "layer", "fastest")
    assert (row.bound, row.ratio) == (">", pytest.approx(500))
    row = at_equal_error(SWEEP, score(0.5, 0.1), "layer", "fastest")
    assert (row.bound, row.ratio) == (">", pytest.approx(5))
    for row in (
        at_equal_density(SWEEP, score(0.05, 0.1), "layer", "fastest"),
        at_equal_error(SWEEP, score(0.9, 1e-9), "layer", "fastest"),
    ):
        assert row.ratio is None and row.reason == "not reached"


def test_settings_are_those_that_are_named() -> None:
    assert SETTINGS["published rule"] == S2OConfig.paper() and SETTINGS["lookups kept"] == S2OConfig()


def test_the_table_shows_what_was_claimed() -> None:
    rows = [Row("error", "layer", "fastest", 2.5, ">", 0.3, 1e-3), Row("error", "layer", "other", reason="not reached")]
    shown = table(rows)
    columns = {column.header: list(column.cells) for column in shown.columns}
    assert columns["measured"] == [">2.50x", "not reached"]
    assert columns["claimed"] == ["3.82x"] * 2 and columns["claim"][1] == ""


def run(**changes: Any) -> None:
    options: dict[str, Any] = {
        "captures": None, "model": None, "layer": None, "length": 1100, "every": 2, "time_length": 1024,
        "density": 0.3, "repetitions": 1, "device": "cpu", "output": None, "as_json": False,
    }  # fmt: skip
    command.main(**(options | changes))


def test_command_line_on_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    some = Structure.draw(1100, 4, 2, 32)
    layer = Layer("x", some.query(0.3)[0], some.key[0], some.value[0], 32**-0.5)
    save_layer(layer, tmp_path / "layer07.safetensors")
    run(captures=[tmp_path / "layer07.safetensors"], output=tmp_path)
    printed = capsys.readouterr().out
    assert "layer07, 1,100 tokens" in printed and "The claims about time need a GPU." in printed
    saved = json.loads((tmp_path / "paper.json").read_text())
    assert [row["claim"] for row in saved["rows"]] == ["error"] * 3 + ["density"] * 3
    assert saved["rows"][0]["claimed"] == CLAIMED["error"] and set(saved["settings"]["s2o"]) == set(SETTINGS)


def test_command_line_on_a_model(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    some = tiny("llama")
    some.config.max_position_embeddings = 4096
    monkeypatch.setattr(command, "load_model", lambda *_: (some, Characters(VOCABULARY)))
    run(layer=[1], as_json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["subject"] for row in rows} == {"SmolLM2-135M-Instruct, layer01, 1,100 tokens"}
    with pytest.raises(UsageError, match="--density must be between 0 and 1, not 2"):
        run(density=2)


def test_calls_are_timed_beside_flash_attention() -> None:
    rows = list(times.attention("smollm2", 512, 0.4, torch.device("cpu"), torch.float32, 1, lambda _: None))
    assert [row.settings for row in rows] == list(times.TIMED) == ["fastest", "lookups kept"]
    assert all(row.ratio and row.seconds and row.density and not row.reason for row in rows)


def test_prefills_are_timed_beside_the_model_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[S2OConfig] = []

    def measured(model: Any, tokens: Any, calls: Any, config: S2OConfig, *_: Any) -> list[Prefill]:
        asked.append(config)
        seconds = {EAGER: 3.0, INDUCTOR: 9.0, S2O: 2.0}
        return [Prefill(512, calls[0].name, name, taken, density=0.1) for name, taken in seconds.items()]

    monkeypatch.setattr(times, "measure_prefills", measured)
    rows = list(times.prefill(Subject("tiny", tiny("llama"), None), 512, 0.1, 1, lambda _: None))
    assert [(row.settings, row.ratio, row.seconds) for row in rows] == [(name, 1.5, 2.0) for name in times.TIMED]
    assert all(config.min_length == 0 for config in asked)
