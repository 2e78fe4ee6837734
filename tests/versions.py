"""The tests with other versions of Python, torch and transformers, each pair in an environment made for it.

    python -m tests.versions --table docs/versions.md

Needs `python3.10` to `python3.13` on the path (with pyenv: PYENV_VERSION=3.10.13:3.11.7:3.12.1:3.13.0), a package index
and, as PyTorch's default build brings CUDA, 6 GB of disk: environments are made and removed one after another.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUICK = (
    "tests/passes",
    "tests/ops/test_operator.py",
    *(
        f"tests/s2o_compile/test_{name}.py"
        for name in ("backend", "cli", "continuous_batching", "export", "transformers")
    ),
)
_PACKAGES = ("torch", "triton", "transformers")


@dataclass(frozen=True)
class Environment:
    """Versions that are tested together; those of Triton and the rest follow from torch and requirements-dev.txt."""

    python: str
    torch: str
    transformers: str | None = None

    @property
    def name(self) -> str:
        """What the environment is called on the command line and on disk."""
        return "-".join(filter(None, (self.python, self.torch, self.transformers)))


ENVIRONMENTS = (
    Environment("3.10", "2.11.0"),
    Environment("3.11", "2.13.0"),
    Environment("3.11", "2.13.0", transformers="5.17.0"),
    Environment("3.11", "2.14.1"),
    Environment("3.12", "2.12.1"),
    Environment("3.13", "2.14.1"),
)


def make(environment: Environment, folder: Path) -> Path:
    """Install what an environment says, and the package with what its tests need; its interpreter.

    Raises:
        subprocess.CalledProcessError: Something cannot be installed, or what is installed disagrees with a requirement.
    """
    python = folder / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    install = [*pip, "install", "--quiet", "--progress-bar", "off"]
    subprocess.run([f"python{environment.python}", "-m", "venv", str(folder)], check=True)
    subprocess.run([*install, "--upgrade", "pip"], check=True)  # Python's own may take hours to see that nothing fits.
    subprocess.run([*install, f"torch=={environment.torch}"], check=True)
    pinned = ["-c", "requirements-dev.txt", f"torch=={environment.torch}", "-e", ".[demo,test]"]
    subprocess.run([*install, *pinned], check=True, cwd=ROOT)
    if environment.transformers:
        subprocess.run([*install, f"transformers=={environment.transformers}"], check=True)
    subprocess.run([*pip, "check"], check=True)
    return python


def installed(python: Path) -> list[str]:
    """The versions of `_PACKAGES` in an environment."""
    code = f"import importlib.metadata as m; print(*map(m.version, {_PACKAGES}))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def run_tests(python: Path, results: Path, arguments: Sequence[str]) -> dict[str, int]:
    """Run pytest with an environment's interpreter; how many tests passed, failed and were skipped."""
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={results}", *arguments]
    subprocess.run(command, cwd=ROOT, env={"OMP_NUM_THREADS": "1"} | os.environ)
    return count(results)


def count(results: Path) -> dict[str, int]:
    """How many tests of a JUnit file passed, failed and were skipped."""
    suite = next(xml.parse(results).iter("testsuite"))
    total, skipped, failures, errors = (int(suite.get(name, 0)) for name in ("tests", "skipped", "failures", "errors"))
    failed = failures + errors
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped}


def with_row(page: str, row: Sequence[object]) -> str:
    """A page whose table of versions has `row`, in place of the one with the same versions if there is one."""
    lines = page.splitlines()
    versions = _line(row[:4])
    rule = max(place for place, line in enumerate(lines) if line.startswith("|---"))
    head, rows = lines[: rule + 1], [line for line in lines[rule + 1 :] if line.startswith("| ")]
    rows = sorted({*(line for line in rows if not line.startswith(versions)), _line(row)})
    rest = [line for line in lines[rule + 1 :] if not line.startswith("| ")]
    return "\n".join([*head, *rows, *rest]) + "\n"


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    """Run the tests in each environment; 0 if all passed."""
    names = [environment.name for environment in ENVIRONMENTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=names, help="an environment; repeatable, all by default")
    parser.add_argument("--all", action="store_true", help="run all tests, not only those of passes and operator")
    parser.add_argument("--workers", type=int, default=2, help="processes of pytest, by default 2")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="where the environments are made")
    parser.add_argument("--keep", action="store_true", help="leave the environments for the next run")
    parser.add_argument("--table", type=Path, help="a page whose table is to have the results")
    options = parser.parse_args()
    arguments = ["-n", str(options.workers), *(["tests"] if options.all else QUICK)]
    good = True
    for environment in ENVIRONMENTS:
        if options.only and environment.name not in options.only:
            continue
        folder = options.folder.resolve() / environment.name
        print(f"{environment.name}: installing into {folder}", flush=True)
        try:
            python = make(environment, folder)
            versions = installed(python)
            found = ", ".join(map(" ".join, zip(_PACKAGES, versions, strict=True)))
            print(f"{environment.name}: testing with {found}", flush=True)
            counts = run_tests(python, folder / "results.xml", arguments)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{environment.name}: not run: {error}", flush=True)
            good = False
            continue
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
        good = good and not counts["failed"]
        print(f"{environment.name}: {', '.join(f'{number} {name}' for name, number in counts.items())}", flush=True)
        if options.table:
            today = datetime.date.today().isoformat()
            row = environment.python, *versions, "all" if options.all else "quick", *counts.values(), today
            options.table.write_text(with_row(options.table.read_text(encoding="utf-8"), row), encoding="utf-8")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
