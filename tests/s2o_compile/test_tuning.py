"""``s2o tune``: what it times, what it makes of the times, and the file that it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile import cli
from s2o_compile._console import Progress
from s2o_compile.ops import break_even, devices, dispatch, tuned
from s2o_compile.ops.break_even import BreakEven
from s2o_compile.tuning import cases as cases_module
from s2o_compile.tuning.cases import MOST_WORK, Case, read_shape, sweep, usual_cases
from s2o_compile.tuning.fit import fit
from s2o_compile.tuning.measure import Row, draw, measure
from s2o_compile.tuning.run import measure_all

CPU = torch.device("cpu")
SHIPPED = BreakEven(1e9, 1000.0, "a test")
TINY = Case(4, 2, 16, 200, 200)


def timed(length: int, heads: int, dense: float, sparse: float) -> Row:
    return Row(Case(heads, heads, 64, length, length), dense, "SDPA", sparse)


amounts = st.tuples(st.sampled_from([256, 512, 1024, 2048, 4096, 8192]), st.integers(1, 64))


@given(st.lists(amounts, min_size=1, max_size=12, unique=True), st.floats(1e7, 1e13), st.floats(100, 5000))
def test_the_fit_finds_limits_that_explain_all_calls(calls: list[tuple[int, int]], work: float, keys: float) -> None:
    def gains(case: Case) -> bool:
        return case.work.multiply_adds >= work and case.work.keys >= keys

    rows = [timed(*call, 1.0, 1.0) for call in calls]
    rows = [Row(row.case, 2.0 if gains(row.case) else 0.5, "SDPA", 1.0) for row in rows]
    found_work, found_keys = fit(rows, SHIPPED)
    for row in rows:
        done = row.case.work
        assert (done.multiply_adds >= found_work and done.keys >= found_keys) is gains(row.case)


def test_what_was_not_measured_is_as_shipped() -> None:
    assert fit([], SHIPPED) == SHIPPED[:2]
    assert fit([Row(TINY, None, "", 1.0, "out of memory")], SHIPPED) == SHIPPED[:2]
    assert fit([timed(8192, 64, 2.0, 1.0)], SHIPPED) == SHIPPED[:2]
    assert fit([timed(8192, 64, 0.5, 1.0)], SHIPPED) == (math.inf, math.inf)
    never = BreakEven(math.inf, math.inf, "a test")
    assert all(limit < math.inf for limit in fit([timed(8192, 64, 2.0, 1.0)], never))


def test_an_outlier_does_not_move_the_limits() -> None:
    rows = [timed(length, 64, 1.0 if length < 2048 else 2.0, 1.3) for length in (512, 1024, 2048, 4096, 8192)]
    before = fit(rows, SHIPPED)
    assert fit([*rows, timed(600, 64, 1.35, 1.3)], SHIPPED) == before


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")])
@pytest.mark.parametrize("is_quick", [True, False])
def test_usual_calls_lie_on_both_sides_of_the_shipped_limits(device: torch.device, is_quick: bool) -> None:
    limits = break_even.shipped(device, torch.float32)
    cases = usual_cases(device, is_quick)
    assert len(cases) == len(set(cases)) and all(case.heads % case.kv_heads == 0 for case in cases)
    for name, limit in (("multiply_adds", limits.work), ("keys", limits.keys)):
        measured = [getattr(case.work, name) for case in cases]
        assert min(measured) <= limit < max(measured)


def test_a_sweep_crosses_what_is_given() -> None:
    assert len(sweep([(4, 2, 16)], [100, 200], [1, 4], [None, 150])) == 6, "a window of 150 hides nothing of 100"
    assert {case.window for case in sweep()} == {None, 512, 4096} and {case.batch for case in sweep()} == {1, 4}
    assert max(case.work.multiply_adds for case in sweep()) <= MOST_WORK
    assert read_shape("32/8/128") == (32, 8, 128)


@pytest.mark.parametrize("case", [TINY, Case(4, 2, 16, 200, 64, batch=2), Case(4, 2, 16, 200, 200, window=50)], ids=str)
def test_calls_are_timed(case: Case) -> None:
    query, key, value = draw(case, CPU, torch.float32)
    assert (query.shape, key.shape, value.shape) == case.shapes
    row = measure(case, CPU, torch.float32)
    assert row.ratio and row.ratio > 0 and not row.reason
    assert (row.by == "SDPA") is (case.window is None and case.queries == case.keys)


def test_inputs_are_as_sparse_as_a_models() -> None:
    """Their density falls with the keys, and half of the channels say most of the logits."""
    query, key, _ = draw(Case(2, 1, 128, 1000, 1000), CPU, torch.float32)
    logits, half = query @ key.mT, query[..., :64] @ key[..., :64].mT
    assert (logits - half).var() < 0.05 * logits.var()
    assert 4 < (logits * 128**-0.5).std() < 7


def test_what_does_not_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setattr("s2o_compile.tuning.measure.scaled_dot_product_attention", fail)
    row = measure(TINY, CPU, torch.float32)
    assert row.dense is None and row.sparse and row.ratio is None and row.reason == "no such kernel"


def test_no_call_begins_when_the_time_is_up() -> None:
    assert not measure_all([TINY], CPU, torch.float32, -1.0, Progress(False)).rows


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", "--device", "cpu", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_operator_reads_what_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "folder"
    monkeypatch.setenv("S2O_TUNED", str(place))
    monkeypatch.setattr(cases_module, "_SHAPES", {"cpu": [(4, 2, 16)]})
    monkeypatch.setattr(cases_module, "_QUICK_LENGTHS", {"cpu": [100, 200]})
    monkeypatch.setattr("s2o_compile.tuning.result.fit", lambda rows, shipped: (12.0, 34.0))
    assert "34 keys a query and 1.2e+01 multiply-adds a call" in run(capsys, "--quick")
    path = tuned.path_of(devices.name_of(CPU), torch.float32)
    assert path is not None and list(place.iterdir()) == [path]
    assert json.loads(path.read_text())["rows"][0]["reason"] == ""
    assert break_even.break_even.__wrapped__(CPU, torch.float32) == (12.0, 34.0, str(path))
    monkeypatch.setattr(dispatch, "break_even", break_even.break_even.__wrapped__)
    call = (*TINY.shapes, TINY.terms, CPU, torch.float32)
    assert "paid here" not in dispatch.why_dense(*call, dispatch.S2OConfig(min_length=300))
    assert dispatch.choose_sparse(*call, dispatch.S2OConfig())


def test_a_sweep_leaves_the_file_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("S2O_TUNED", str(tmp_path / "folder"))
    output = tmp_path / "sweep.json"
    calls = ("--shape", "4/2/16", "--length", "100", "--length", "200", "--window", "0", "--batch", "1")
    found = json.loads(run(capsys, "--sweep", *calls, "--output", str(output), "--json"))
    assert found == json.loads(output.read_text()) and len(found["rows"]) == 2
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "100"], "--shape, --length, --batch and --window choose the calls of --sweep: add it."),
        (
            ["--sweep", "--shape", "9/2/64"],
            "--shape takes query heads/KV heads/channels, such as 32/8/128, not '9/2/64'",
        ),
        (["--quick"], "S2O_TUNED=0 ignores what is measured: unset it, or choose a file with --output."),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["tune", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err
