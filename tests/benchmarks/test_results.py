"""Results are read back as they were written, compared beyond their noise, and are what the pages show."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calibration, compare, generation, layers, pages
from benchmarks.paper import claims as paper
from benchmarks.prefill import measure as prefill
from benchmarks.prefill import report as prefill_report
from benchmarks.results import command, commit, describe, load, record, row_key, save, versions
from benchmarks.speed import measure as speed
from benchmarks.speed import report as speed_report
from benchmarks.zoo import report as zoo
from s2o_compile import cli
from s2o_compile._console import UsageError

MEASURES = {"ms": ("ms", "spread"), "density": ("share", None)}


def result(*rows: dict[str, Any]) -> dict[str, Any]:
    return record("speed", rows, ("length", "name"), MEASURES, torch.device("cpu"), {"dtype": "float32"})


def row(name: str = "default", **fields: Any) -> dict[str, Any]:
    return {"length": 8192, "name": name, **fields}


class TestFiles:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        written = result(row(ms=1.5, spread=0.1, density=0.12), row("flash", ms=2.0))
        save(written, tmp_path / "speed.json")
        read = load(tmp_path / "speed.json")
        assert read == json.loads(json.dumps(written))
        assert read["versions"]["torch"] == torch.__version__ and "thread" in read["device"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", read["date"])
        assert read["measures"]["ms"] == {"unit": "ms", "spread": "spread"}

    def test_the_commit_is_that_of_the_checkout(self) -> None:
        assert commit() is None or re.fullmatch("[0-9a-f]{12}(-dirty)?", commit() or "")
        assert {"python", "s2o-compile", "torch"} <= versions().keys()

    def test_a_row_is_known_by_what_it_has_of_the_key(self) -> None:
        found = result({"length": 1, "name": None})
        assert describe(row_key(found, found["rows"][0])) == "length 1"

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{", "is not JSON: "),
            ("[" * 100_000, "is not JSON: "),
            ("[]", "is no result of a benchmark: it is no JSON object."),
            ("{}", "is no result of a benchmark: it has no 'benchmark'."),
            (json.dumps(result() | {"rows": [1]}), "its rows are not a list of JSON objects."),
            (json.dumps(result() | {"key": 1}), "its key is not a list"),
            (json.dumps(result() | {"measures": {"ms": "ms"}}), "a measure has no unit."),
            (json.dumps(result(row(ms=1), row(ms=2))), "two rows are 'length 8192, default'."),
        ],
    )
    def test_what_is_no_result_is_one_sentence(self, text: str, reason: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.json"
        path.write_text(text)
        with pytest.raises(UsageError) as raised:
            load(path)
        message = str(raised.value)
        assert message.startswith(f"{path} is ") and reason in message and message.count("\n") == 0


@pytest.mark.parametrize(
    ("row_type", "measures"),
    [
        (calibration.Row, calibration.MEASURES),
        (layers.Row, layers.MEASURES),
        (paper.Row, paper.MEASURES),
        (prefill.Row, prefill_report.MEASURES),
        (speed.Row, speed_report.MEASURES),
        (zoo.Row, zoo.MEASURES),
    ],
)
def test_what_is_said_to_be_measured_is_in_the_rows(row_type: Any, measures: dict[str, tuple[str, str | None]]) -> None:
    fields = {field.name for field in dataclasses.fields(row_type)}
    assert measures.keys() | {spread for _, spread in measures.values() if spread} <= fields


def test_generated_text_is_a_result(tmp_path: Path) -> None:
    rows = [generation.Row("dynamic", 0.0, 2, 2, 2), generation.Row("dynamic", 0.008, 2, 1, 2)]
    save(generation.as_dict(rows, {"length": 4096}, torch.device("cpu")), tmp_path / "generation.json")
    assert compare.figures(load(tmp_path / "generation.json"))["dynamic, threshold 0.008", "equal"] == (1, None)


class TestComparing:
    def test_only_what_exceeds_its_spread_moved(self) -> None:
        old = result(row(ms=1.0, spread=0.05), row("flash", ms=1.0, spread=0.3), row("gone", ms=1.0))
        new = result(row(ms=1.2, spread=0.1), row("flash", ms=1.2, spread=0.0), row("added", ms=1.0))
        found = compare.compare(old, new)
        (moved,) = found.moved
        assert (moved.row, moved.measure, moved.unit) == ("length 8192, default", "ms", "ms")
        assert moved.change == pytest.approx(0.2) and moved.noise == 0.1
        assert found.within == 1 and found.facts == {}
        assert found.only_old == [("length 8192, gone", "ms")]
        assert found.only_new == [("length 8192, added", "ms")]

    def test_the_facts_that_differ_are_named(self) -> None:
        old = result() | {"settings": {"s2o": {"pool": 1, "sample": 16}, "dtype": "float32"}}
        new = result() | {"settings": {"s2o": {"pool": 2, "sample": 16}}}
        assert compare.compare(old, new).facts == {
            "settings.s2o.pool": (1, 2),
            "settings.dtype": ("float32", None),
        }

    def test_without_a_spread_the_noise_is_given(self) -> None:
        old, new = result(row(density=0.100)), result(row(density=0.102))
        assert len(compare.compare(old, new).moved) == 1
        assert not compare.compare(old, new, noise=0.03).moved
        assert compare.compare(result(row(density=0)), new).moved[0].change is None

    def test_what_could_not_run_is_only_in_the_other(self) -> None:
        found = compare.compare(result(row(ms=1.0)), result(row(ms=None, reason="no memory")))
        assert found.only_old == [("length 8192, default", "ms")] and not found.moved

    def test_the_command(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        save(result(row(ms=1.0, spread=0.0)), old)
        save(result(row(ms=2.0, spread=0.0)) | {"device": "another"}, new)
        code, printed, _ = run(capsys, str(old), str(new))
        assert code == 0 and "1 moved, 0 within the noise" in printed and "+100.0%" in printed
        assert "device: " in printed and "another" in printed
        code, printed, _ = run(capsys, str(old), str(new), "--json")
        found = json.loads(printed)
        assert code == 0 and found["moved"][0]["new"] == 2.0 and found["facts"]["device"][1] == "another"

    def test_bad_files_are_one_sentence(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        good, missing, other = tmp_path / "good.json", tmp_path / "missing.json", tmp_path / "other.json"
        save(result(), good)
        save(result() | {"benchmark": "prefill"}, other)
        for paths, message in [
            ((good, missing), f"s2o: {missing} cannot be read: No such file or directory.\n"),
            ((good, other), f"s2o: {good} is a result of 'speed' and {other} of 'prefill'.\n"),
        ]:
            code, printed, errors = run(capsys, *map(str, paths))
            assert code == 2 and not printed and errors == message


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "compare", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


class TestTables:
    ROWS = (
        {"method": "a", "length": 1, "ms": 1.25, "error": None},
        {"method": "a", "length": 2, "ms": 2.5, "error": 0.1},
        {"method": "b", "length": 1, "ms": 3.0, "error": 0.2},
    )

    def test_a_row_is_a_line(self) -> None:
        spec = pages.read_spec(
            "where: method=a\ncolumns: tokens = {length:,} | time\n  spent = {ms:.1f} | e = {error}\n"
        )
        assert pages.render(self.ROWS, spec).splitlines() == [
            "| tokens | time spent | e |", "|---|---|---|", "| 1 | 1.2 | |", "| 2 | 2.5 | 0.1 |",
        ]  # fmt: skip

    def test_rows_side_by_side(self) -> None:
        spec = {"columns": "= {method}", "across": "{length} tokens", "cell": "{ms:g} ms"}
        assert pages.render(self.ROWS, spec).splitlines() == [
            "| | 1 tokens | 2 tokens |", "|---|---|---|", "| a | 1.25 ms | 2.5 ms |", "| b | 3 ms | |",
        ]  # fmt: skip

    @pytest.mark.parametrize("changes", [{"columns": "time = {seconds:.1f}"}, {"across": "{size}", "cell": "{ms}"}])
    def test_fields_that_no_row_has_are_refused(self, changes: dict[str, str]) -> None:
        with pytest.raises(UsageError, match=r"no row has the field '(seconds|size)' of a table; rows have error, "):
            pages.render(self.ROWS, {"columns": "= {method}"} | changes)


class TestPages:
    """What is committed."""

    @pytest.mark.parametrize("page", pages.pages(), ids=lambda page: page.name)
    def test_tables_are_those_of_the_results(self, page: Path) -> None:
        text = page.read_text(encoding="utf-8")
        assert pages.updated(text) == text, "run python -m benchmarks.pages"
        assert len(pages.TABLE.findall(text)) == text.count("<!-- table: ") == text.count("<!-- end of table -->")

    def test_each_result_says_where_it_is_from_and_is_shown(self) -> None:
        shown = "".join(page.read_text(encoding="utf-8") for page in pages.pages())
        for path in sorted(pages.RESULTS.glob("*.json")):
            found = load(path)
            assert found["rows"] and found["device"] and found["date"] and found["versions"]
            assert found["commit"] or found["provenance"]
            assert f"<!-- table: {path.name}\n" in shown, f"no page has a table of {path.name}"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["/usr/bin/s2o", "bench", "quality", "--s2o", "radius=2 pool=1"], "s2o bench quality --s2o 'radius=2 pool=1'"),
        (["/a/benchmarks/host/__main__.py", "--json"], "python -m benchmarks.host --json"),
        (["/a/benchmarks/layers.py", "--json"], "python -m benchmarks.layers --json"),
    ],
)
def test_the_command_is_as_typed(arguments: list[str], shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", arguments)
    assert command() == shown
