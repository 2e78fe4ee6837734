"""Files are written whole or not at all, whoever writes them and whatever goes wrong."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from s2o_compile import CalibrationError, _command_line, benchmarks, visualize, writing
from s2o_compile._console import UsageError
from s2o_compile.benchmarks import captured
from s2o_compile.demo import report
from s2o_compile.view import ViewError
from s2o_compile.writing import WriteError, append_text, check_writable, replacing, write_text

from .test_damaged_files import calibration

ROOM = 100
"""Bytes that files may have in `full_disk`, too few for any that the tests write."""

ERRORS = (CalibrationError, UsageError, ViewError, WriteError)
"""What becomes one sentence on the command line."""


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond `ROOM`: "File too large", in the same places as "No space left on device"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def attend(query: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)


def view(**where: Any) -> None:
    visualize(attend, torch.randn(1, 2, 200, 16), **{"output": None, **where})


WRITERS: dict[str, Callable[[Path], Any]] = {
    "calibration.json": lambda path: calibration().save(path),
    "demo.json": lambda path: report.save_json(SimpleNamespace(as_dict=lambda: {"x": "y" * 200}), path),
    "density.png": lambda path: report.save_picture(
        SimpleNamespace(sites=[SimpleNamespace(density=[0.1, 0.2])], model="model", tokens=9), path
    ),
    "report.html": lambda path: view(output=path),
    "by-position.png": lambda path: view(png=path.parent),
    "layer.safetensors": lambda path: captured.save_layer(captured.Layer("x", *torch.randn(3, 2, 50, 16), 1.0), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_old_file_survives_a_full_disk(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, write = tmp_path / name, WRITERS[name]
    write(path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before[name]) > ROOM
    torch.manual_seed(1)
    with full_disk(), pytest.raises(ERRORS, match="File too large"):
        write(path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    for file in tmp_path.iterdir():
        file.unlink()
    with full_disk(), pytest.raises(ERRORS):
        write(path)
    assert not any(tmp_path.iterdir())


def test_nothing_is_written_in_another_way() -> None:
    """Writers of the package and the benchmarks use `write_text`, or write to a `place` or into memory."""
    folders = Path(writing.__file__).parent, *map(Path, benchmarks.__path__)
    files = [file for folder in folders for file in folder.rglob("*.py")]
    assert len(files) > 60
    pattern = re.compile(r"\.write_(text|bytes)\(|open\([^)]*[\"'][wax]|\.savefig\((?!place,|file,|png,)")
    found = {file.name for file in files if pattern.search(file.read_text())}
    assert found == {"writing.py"}


def test_lines_are_added(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    for line in ("one\n", "two\n"):
        append_text(path, line)
    assert path.read_text() == "one\ntwo\n"
    before = path.read_bytes()
    with full_disk(), pytest.raises(WriteError, match="File too large"):
        append_text(path, "x" * 2 * ROOM)
    assert path.read_bytes().startswith(before)
    with pytest.raises(WriteError, match="Is a directory"):
        append_text(tmp_path, "x")


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (path := tmp_path / "file.txt").write_text("old")
    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), replacing(path) as place:
            place.write_text("half of the n")
            assert place.suffix == ".txt" and path.read_text() == "old"
            raise error
        assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]


def test_a_killed_process_leaves_what_was_there(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_text("old")
    code = "import os, sys\nfrom s2o_compile.writing import replacing\n"
    code += "with replacing(sys.argv[1]) as place: place.write_text('half'); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert path.read_text() == "old"


def test_several_processes_that_write_one_file(tmp_path: Path) -> None:
    """At any time it is what one of them wrote."""
    path = tmp_path / "file"
    code = "import sys\nfrom s2o_compile.writing import write_text\n"
    code += "for _ in range(30): write_text(sys.argv[1], sys.argv[2] * 500_000)"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), letter]) for letter in "abc"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 500_000 and text == text[0] * 500_000
            seen.add(text[0])
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    assert seen and [*tmp_path.iterdir()] == [path]


def test_the_file_stays_of_its_kind(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_text("old")
    path.chmod(0o604)
    (link := tmp_path / "link").symlink_to(path)
    write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o604
    write_text(os.devnull, "new")
    assert Path(os.devnull).is_char_device()
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "other", "new")
    finally:
        os.umask(umask)
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o640


def test_no_room_for_a_device(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="No space left on device: '/dev/full'"):
        write_text("/dev/full", "x" * 100_000)


def test_it_is_known_beforehand(tmp_path: Path) -> None:
    (path := tmp_path / "file").write_text("old")
    for writable in (path, tmp_path / "new", os.devnull):
        check_writable(writable)
    assert path.read_text() == "old" and [*tmp_path.iterdir()] == [path]
    for other in (tmp_path, tmp_path / "no" / "file", path / "file"):
        with pytest.raises(OSError):
            check_writable(other)


def test_the_command_line_says_it_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.Typer()

    @command.command()
    def save() -> None:
        write_text(tmp_path / "file", "x" * 1000)

    with full_disk(), pytest.raises(SystemExit) as stop:
        _command_line.run(command, "s2o", [])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"s2o: {tmp_path / 'file'} cannot be written: File too large.\n"
