"""A file that cannot be written is one sentence before the work, not after it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from benchmarks import capture, generation
from benchmarks.command import run
from benchmarks.zoo import __main__ as zoo
from s2o_compile import cli
from s2o_compile.testbed.options import check_file


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs the command line of a benchmark, which must end with exit code 2; gives what it printed on stderr."""

    def call(main: Callable[..., None], *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark", *arguments])
        with pytest.raises(SystemExit) as stop:
            run(main)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and not captured.out
        return captured.err

    return call


def test_the_table_of_the_zoo(tmp_path: Path, fail: Callable[..., str]) -> None:
    path = tmp_path / "missing" / "file"
    printed = fail(zoo.main, "--markdown", str(path))
    assert printed == f"The file {path} cannot be written: No such file or directory.\n"


@pytest.mark.parametrize(("main", "option"), [(capture.main, []), (generation.main, ["--output"])])
def test_folders_of_benchmarks(
    main: Callable[..., None], option: list[str], tmp_path: Path, fail: Callable[..., str]
) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "folder"
    assert fail(main, *option, str(folder)) == f"The folder {folder} cannot be made: Not a directory.\n"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that nobody can write into")
def test_a_folder_that_cannot_be_written_into(fail: Callable[..., str]) -> None:
    assert "The folder /proc/self cannot be written into: " in fail(generation.main, "--output", "/proc/self")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "lama"], "--only must be one of 'biogpt', "),
        (["--nonsense"], "No such option: --nonsense\n"),
        (["--json", "extra"], "unexpected extra argument"),
    ],
)
def test_bad_options_are_one_sentence(arguments: list[str], message: str, fail: Callable[..., str]) -> None:
    printed = fail(zoo.main, *arguments)
    assert message in printed and printed.count("\n") == 1


def test_the_zoo_gives_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["zoo", "--only", "vit", "--json"])
    with pytest.raises(SystemExit) as stop:
        run(zoo.main)
    assert stop.value.code == 0
    assert {row["architecture"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"vit"}


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
