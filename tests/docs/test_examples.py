"""The examples run as a reader runs them, on their tiny model and on one that is named."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs an example by name with arguments; gives its exit code and what it printed on both streams."""

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("model", [[], ["path/to/model"]], ids=["random", "named"])
@pytest.mark.usefixtures("checkout")
def test_generate(model: list[str], run) -> None:
    code, printed, _ = run("generate", *model, "--threshold", "0", "--length", "200", "--tokens", "4")
    assert code == 0
    assert "2 sparse calls" in printed
    assert "The first 4 of 4 tokens are those of dense attention." in printed


@pytest.mark.usefixtures("checkout")
def test_serving(run) -> None:
    code, printed, _ = run("serving", "--threshold", "0", "--length", "200", "--chunk", "64", "--tokens", "3")
    chunked = printed.splitlines()
    _, printed, _ = run("serving", "--threshold", "0", "--length", "200", "--chunk", "200", "--tokens", "3")
    answers = [[line.partition(":")[2] for line in lines] for lines in (chunked, printed.splitlines())]
    assert code == 0 and len(answers[0]) == 3
    assert answers[0] == answers[1]


def test_documents(run) -> None:
    code, printed, _ = run("documents", "--length", "1000", "--threshold", "0")
    assert code == 0
    assert float(printed.split()[3].rstrip(";")) < 1e-10


@pytest.mark.docs_slow
@pytest.mark.usefixtures("checkout")
def test_export(run) -> None:
    code, printed, _ = run("export", "--length", "64")
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()] == ["64", "32"]
    assert all(float(line.split()[-1]) < 1e-2 for line in printed.splitlines())


def test_kernel() -> None:
    runpy.run_path(str(EXAMPLES / "test_kernel.py"))["test_agrees_with_the_reference"]()


@pytest.mark.parametrize("name", ["generate", "export", "serving"])
def test_a_model_that_is_not_there_is_one_sentence(name: str, tmp_path: Path, run) -> None:
    code, printed, errors = run(name, str(tmp_path / "nothing"))
    assert code == 2 and not printed
    assert "cannot be loaded" in errors and "Traceback" not in errors
