"""The command line: what users do wrong is one sentence on stderr and exit code 2."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer

from s2o_compile import _command_line, cli, demo, doctor
from s2o_compile._console import UsageError
from s2o_compile.cli import app
from s2o_compile.cli.tune import tune
from s2o_compile.ops import break_even, devices
from s2o_compile.testbed import prepare
from s2o_compile.testbed.document import Document

from ..passes.models import tiny, tokens


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command line, expect exit code 2 and one line on stderr; return it."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("s2o: ")
    return lines[0]


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["--help"], *([name, "--help"] for name in ("calibrate", "demo", "explain", "tune", "view")), []],
)
def test_harmless_calls(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0 and capsys.readouterr().out


def test_help_is_wrapped_for_the_terminal() -> None:
    paragraphs = app._help(tune).split("\n\n")
    assert len(paragraphs) == 2 and not any("\n" in text for text in paragraphs)


def test_help_does_not_import_torch() -> None:
    code = "import sys, s2o_compile.cli.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "No such command"),
        (["demo", "--nonsense"], "No such option"),
        (["demo", "--length", "many"], "'--length'"),
        (["demo", "--length", "10"], "--length must be at least 1,024 tokens, not 10."),
        (["view", "--length", "10"], "--length must be at least 1,024 tokens, not 10."),
        (["calibrate", "--document", "no/such/file"], "The document no/such/file cannot be read: No such file"),
        (["demo", "--repeats", "0"], "--repeats must be at least 1, not 0."),
        (["demo", "--threshold", "3"], "threshold must be a number from 0 to below 1, not 3.0"),
        (["demo", "--option", "segment"], "--option takes NAME=VALUE"),
        (["demo", "--option", "segment=33"], "segment must be a power of two"),
        (["demo", "--option", "segmnt=32"], "unknown option 'segmnt'; the options of s2o are threshold"),
        (["demo", "--option", "rule=maybe"], "rule must be 'sampled' or 'dropped' or 'means' or 'gain'"),
        (["demo", "--option", "tail=none"], "tail is now the rule of Ranking"),
        (["demo", "--option", "tile=16"], "tile was removed: it follows segment"),
        (["demo", "--option", "calibration=no/such/file"], "calibration 'no/such/file' cannot be read: No such file"),
        (["explain", "--option", "calibration=file"], "calibration 'file' must be a file that s2o_compile.calibrate"),
        (["demo", "--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["explain", "--threshold", "3"], "threshold must be a number from 0 to below 1, not 3.0"),
        (["explain", "--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["explain", "--document"], "--document"),
        (["doctor", "--length", "3"], "No such option"),
        (["demo", "--dtype", "int8"], "--dtype must be auto, float16"),
    ],
)
def test_bad_options(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("{}")
    assert message in fail(capsys, *arguments)


def test_one_sentence_without_numpy() -> None:
    """PyTorch does not need it, and warns."""
    code = "import sys; sys.modules['numpy'] = None; from s2o_compile.cli import main; main(['explain', '--length=1'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["s2o: --length must be at least 1,024 tokens, not 1."]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "cannot be made" in fail(capsys, "demo", "--output", str(tmp_path / "file" / "folder"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UsageError("Too short."), "Too short."),
        (ModuleNotFoundError("No module", name="gguf"), "needs the package gguf"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), "not enough memory"),
    ],
)
def test_errors_of_the_demo(
    error: Exception,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_demo(*_: object) -> None:
        raise error

    monkeypatch.setattr(demo, "run_demo", run_demo)
    assert message in fail(capsys, "demo", "--output", str(tmp_path))


def test_a_path_that_leads_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", str(tmp_path / "model")])
    assert stop.value.code == 2
    message = f"s2o: The model {tmp_path / 'model'} cannot be loaded: there is no such file or folder."
    assert capsys.readouterr().err.splitlines()[-1] == message


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", str(tmp_path)])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and not captured.out
    assert captured.err.splitlines()[-1].startswith(f"s2o: The model {tmp_path} cannot be loaded: ")


@pytest.mark.parametrize("json_only", [False, True])
def test_explain(json_only: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = Document(tokens=tokens(200)[0].tolist(), middle=[], end=[], scored=range(100, 200))
    monkeypatch.setattr(prepare, "load_model", lambda *_: (tiny("llama"), object()))
    monkeypatch.setattr(prepare, "check_document", lambda *_: None)
    monkeypatch.setattr(prepare, "build_document", lambda *_: text)
    with pytest.raises(SystemExit) as stop:
        cli.main(["explain", "any", "--length", "200", "--measure", "--min-length", "0", *["--json"] * json_only])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    if json_only:
        report = json.loads(printed)
        assert (report["rewritten"], report["dense"]) == (2, 0)
        assert report["decisions"][0]["mask"] == "causal, offset 0; key padding from input attention_mask"
        assert len(report["decisions"][0]["density"]) == 4
    else:
        assert "2 of 2 attention sites rewritten" in printed and "density" in printed


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert stop.value.code == (0 if all(check["passed"] for check in checks.values()) else 1)
    assert checks["torch"]["found"] == torch.__version__
    assert checks['torch.compile(backend="s2o")']["passed"] and checks["cpu, self-test"]["passed"]
    assert ("cuda" in checks) == (not torch.cuda.is_available())


def test_doctor_says_both_limits_of_a_cpu_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "kind_of", lambda _: devices.AMX)
    monkeypatch.setattr(doctor, "break_even", break_even.break_even.__wrapped__)
    limits = {check.name: check.found for check in doctor._device(torch.device("cpu")) if "sparse from" in check.name}
    assert list(limits) == ["cpu, float32, sparse from", "cpu, half precision, sparse from"]
    assert [found.split()[0] for found in limits.values()] == ["6,144", "20,480"]


@pytest.mark.parametrize(
    ("source", "advice"), [("shipped for sm_90", "s2o tune"), ("/somewhere/tuned-gpu.json", "delete this file")]
)
def test_doctor_says_how_to_change_the_limits(source: str, advice: str) -> None:
    for keys in (4096, math.inf):
        limits = break_even.BreakEven(1e11, keys, source)
        assert advice in doctor._break_even("cuda:0", limits).advice


def test_doctor_says_what_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "TOLERANCE", 0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    printed = capsys.readouterr().out
    assert stop.value.code == 1
    assert "report this" in printed and "C++" in printed


def test_defects_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_demo(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(demo, "run_demo", run_demo)
    with pytest.raises(AssertionError):
        cli.main(["demo", "--output", str(tmp_path)])


@pytest.mark.parametrize("name", ["s2o", None])
def test_an_interruption_is_one_line(name: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    command = typer.Typer()

    @command.command()
    def work() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        _command_line.run(command, name, [])
    assert stop.value.code == 130
    assert capsys.readouterr().err == ("s2o: interrupted.\n" if name else "interrupted.\n")


def test_a_reader_that_leaves() -> None:
    code = "from s2o_compile.cli import main; main(['--help'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() in (0, 1)


def test_output_that_finds_no_room() -> None:
    code = "from s2o_compile.cli import main; main(['--help'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode != 0 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
