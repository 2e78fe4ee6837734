"""Results of benchmarks as files: rows and their units, and when, where and with which versions they were measured.

A row is a flat mapping. The fields of `key` say what was measured and tell rows apart, those of `measures` are figures,
and the others are remarks.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from s2o_compile._console import UsageError
from s2o_compile.version import VERSION
from s2o_compile.writing import write_text

FACTS = ("benchmark", "commit", "date", "device", "versions", "settings")
"""The fields of a result beside its rows, as `record` documents them."""


def record(
    benchmark: str,
    rows: Sequence[Mapping[str, Any]],
    key: Sequence[str],
    measures: Mapping[str, tuple[str, str | None]],
    device: torch.device,
    settings: Mapping[str, Any],
    **details: Any,
) -> dict[str, Any]:
    """A result of this process.

    Args:
        benchmark: The name of the command.
        rows: What was measured.
        key: The fields that tell rows apart; a row need not have all of them.
        measures: For each measured field its unit, and the field of its spread (range of the repetitions over their
            median) or None.
        device: What it ran on.
        settings: Model, dtype, options and all else that was chosen.
        details: More fields, for readers of a single result.
    """
    return {
        "benchmark": benchmark,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "versions": versions(),
        "settings": dict(settings),
        "command": command(),
        "key": list(key),
        "measures": {name: {"unit": unit, "spread": spread} for name, (unit, spread) in measures.items()},
        "rows": [dict(row) for row in rows],
        **details,
    }


def as_text(result: Mapping[str, Any]) -> str:
    """A result as JSON."""
    return json.dumps(result, indent=2)


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result; the file is replaced when the new one is whole."""
    write_text(path, as_text(result) + "\n")


def load(path: Path) -> dict[str, Any]:
    """A result that `save` wrote.

    Raises:
        UsageError: The file cannot be read or is no result, in one sentence.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}.") from error
    reason = _defect(result)
    if reason:
        raise UsageError(f"{path} is no result of a benchmark: {reason}.")
    return result


def _defect(result: Any) -> str:
    """Why something is no result, or ""."""
    if not isinstance(result, dict):
        return "it is no JSON object"
    missing = [name for name in (*FACTS, "key", "measures", "rows") if name not in result]
    if missing:
        return f"it has no {missing[0]!r}"
    if not isinstance(result["rows"], list) or not all(isinstance(row, dict) for row in result["rows"]):
        return "its rows are not a list of JSON objects"
    if not isinstance(result["key"], list) or not isinstance(result["measures"], dict):
        return "its key is not a list, or its measures are not a JSON object"
    if not all(isinstance(each, dict) and "unit" in each for each in result["measures"].values()):
        return "a measure has no unit"
    keys = [row_key(result, row) for row in result["rows"]]
    twice = next((key for place, key in enumerate(keys) if key in keys[:place]), None)
    return f"two rows are {describe(twice)!r}" if twice else ""


def row_key(result: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Names and values of the fields that tell a row from others, without those that it does not have."""
    return tuple((name, row[name]) for name in result["key"] if row.get(name) not in (None, ""))


def describe(key: tuple[tuple[str, Any], ...]) -> str:
    """A row's key as text."""
    return ", ".join(value if isinstance(value, str) else f"{name} {value}" for name, value in key)


def command() -> str:
    """The command line of this process, as it is typed where the package is installed."""
    program, arguments = Path(sys.argv[0]), sys.argv[1:]
    if program.suffix != ".py":
        return shlex.join([program.name, *arguments])
    module = program.parent.name if program.name == "__main__.py" else program.stem
    return shlex.join(["python", "-m", f"benchmarks.{module}", *arguments])


@functools.cache
def commit() -> str | None:
    """The commit of the checkout that this file is in, with "-dirty" where files differ from it; None without one."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it runs on, as far as it is installed."""
    found = {"python": platform.python_version(), "s2o-compile": VERSION, "torch": torch.__version__}
    for package in ("triton", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device_name(device: torch.device) -> str:
    """The name of a GPU; or that of the CPU, and how many threads PyTorch uses of it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} {'thread' if threads == 1 else 'threads'}"
