"""A file that cannot be written is one sentence before the work, not after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import capture, compile_cost, generation
from benchmarks.command import run
from benchmarks.zoo import __main__ as zoo
from s2o_compile import cli
from s2o_compile.cli.options import check_file


@pytest.mark.parametrize(
    ("main", "option"),
    [
        (zoo.main, "--json"),
        (zoo.main, "--markdown"),
        (compile_cost.main, "--json"),
        (generation.main, "--json"),
    ],
    ids=lambda value: getattr(value, "__module__", value),
)
def test_files_of_benchmarks(
    main: Callable[..., None],
    option: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "missing" / "file"
    monkeypatch.setattr(sys, "argv", ["benchmark", option, str(path)])
    with pytest.raises(SystemExit) as stop:
        run(main)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    assert captured.err == f"The file {path} cannot be written: No such file or directory.\n"


def test_the_folder_of_captures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr(sys, "argv", ["capture", str(file / "folder")])
    with pytest.raises(SystemExit) as stop:
        run(capture.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"The folder {file / 'folder'} cannot be made: Not a directory.\n"


@pytest.mark.parametrize("command", ["calibrate", "view"])
def test_files_of_commands(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "no/such/model", "--output", str(tmp_path)])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"s2o: The file {tmp_path} cannot be written: Is a directory.\n"


def test_checking_leaves_everything_as_it_was(tmp_path: Path) -> None:
    check_file(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").write_text("kept")
    check_file(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "kept"
