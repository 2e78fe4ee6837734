"""``s2o bench`` runs the benchmarks that are installed with the package."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from s2o_compile import cli
from s2o_compile.cli.bench import BENCHMARKS


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "--help")
    assert code == 0 and all(name in printed for name in BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_has_a_main(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(f"s2o_compile.benchmarks.{BENCHMARKS[name]}").main
    code, printed, _ = run(capsys, name, "--help")
    assert code == 0 and "--device" in printed


@pytest.mark.parametrize("name", ["distributed", "prefill", "serving", "speed"])
def test_help_says_which_lengths_are_the_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = importlib.import_module(f"s2o_compile.benchmarks.{BENCHMARKS[name]}").LENGTHS
    _, printed, _ = run(capsys, name, "--help")
    words = set(printed.replace(",", " ").split())
    assert {str(length) for each in lengths.values() for length in each} <= words


def test_the_help_of_s2o_imports_none() -> None:
    code = (
        "import sys\nfrom s2o_compile import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: print([n for n in sys.modules if n == 'torch' or n.startswith('s2o_compile.benchmarks')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "bench" in done.stdout and done.stdout.splitlines()[-1] == "[]"


def test_speed_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ["--device", "cpu", "--length", "128", "--s2o", "default", "--repetitions", "1"]
    code, printed, _ = run(capsys, "speed", *options, "--json", "--output", str(tmp_path))
    assert code == 0
    assert [row["name"] for row in json.loads(printed)["rows"]] == ["flash", "s2o, default"]
    assert json.loads((tmp_path / "speed.json").read_text()) == json.loads(printed)
    code, printed, _ = run(capsys, "speed", *options)
    assert code == 0 and "128 positions, float32, density 0.1" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--length", "10"], "'--length'"),
        (["speed", "--shape", "gpt"], "--shape must be one of"),
        (["prefill", "--density", "2"], "--density must be between 0 and 1, not 2.0"),
        (["prefill", "--device", "tpu"], "--device must be auto, cpu or cuda"),
        (["prefill", "--length", "10"], "--length must be at least 1,024 tokens, not 10."),
        (["frontier", "nowhere.safetensors"], "cannot be read"),
        (["paper", "nowhere.safetensors"], "cannot be read"),
        (["frontier", "nowhere.safetensors", "--s2o", "pool"], "--s2o takes NAME=VALUE, not 'pool'."),
        (["calibration", "--budget", "3"], "--budget must be above 0 and below 0.4, not 3.0."),
        (["nothing"], "No such command"),
    ],
)
def test_errors_are_one_sentence(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, errors = run(capsys, *arguments)
    assert code == 2 and not printed
    (sentence,) = errors.strip().splitlines()
    assert sentence.startswith("s2o: ") and message in sentence
