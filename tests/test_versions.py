"""The command that tests other versions: what it counts and writes, and that pyproject.toml promises no more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from .versions import ENVIRONMENTS, ROOT, count, run_tests, with_row

SUITE = """
import pytest
def test_passes(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise ValueError
def test_errs(broken): pass
@pytest.mark.parametrize("x", [1, 2, 3])
def test_skips(x): pytest.skip()
"""
PAGE = (
    "# Versions\n\n| Python | torch |\n|---|---|\n| 3.10 | 2.11 | 3 | 5 | old |\n| 3.9 | 2 | 3 | 5 | kept |\n\nText.\n"
)


def test_counts(tmp_path: Path) -> None:
    suite = tmp_path / "test_some.py"
    suite.write_text(SUITE, encoding="utf-8")
    counts = run_tests(Path(sys.executable), tmp_path / "results.xml", ["-c", "/dev/null", str(suite)])
    assert counts == count(tmp_path / "results.xml") == {"passed": 1, "failed": 2, "skipped": 3}


def test_a_row_is_replaced_or_added() -> None:
    assert with_row(PAGE, ["3.10", "2.11", 3, 5, "new"]) == PAGE.replace("old", "new")
    assert with_row(PAGE, ["3.10", "2.11", 3, 6, "new"]) == PAGE.replace(
        "old |\n", "old |\n| 3.10 | 2.11 | 3 | 6 | new |\n"
    )


def test_what_is_required_is_tested() -> None:
    required = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for name, text, versions in [
        ("python", r'requires-python = ">=([\d.]+)"', [item.python for item in ENVIRONMENTS]),
        ("torch", r'"torch>=([\d.]+)', [item.torch for item in ENVIRONMENTS]),
        ("transformers", r'"transformers>=([\d.]+)', [item.transformers for item in ENVIRONMENTS if item.transformers]),
    ]:
        (least,) = re.findall(text, required)
        assert any(version == least or version.startswith(f"{least}.") for version in versions), name


def test_an_environment_that_cannot_be_made_is_no_success(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.versions", "--only", "3.10-2.11.0", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and "3.10-2.11.0: not run: " in done.stdout
