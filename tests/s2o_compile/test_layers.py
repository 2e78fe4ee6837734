"""What the parts of the package may import: the command line stands on the benchmarks, and nothing on either."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {"_command_line", "benchmarks", "cli", "demo", "testbed"}
NEVER = {
    "benchmarks": {"cli", "demo"},
    "demo": {"benchmarks", "cli"},
    "tuning": COMMANDS,
    "testbed": {"benchmarks", "cli", "demo"},
    "calibration": COMMANDS,
    "integrations": COMMANDS,
    "view": COMMANDS,
}
"""By part of the package, those that it does not import."""


def imported(file: Path) -> Iterator[str]:
    """The parts of the package that a file of one of them imports, also inside functions."""
    inside = ROOT / "s2o_compile"
    home = file.parent.relative_to(inside if inside in file.parents else ROOT).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            packages = ("s2o_compile", *home)[: len(home) + 2 - node.level] if node.level else ()
            above = "".join(f"{package}." for package in packages)
            names = [f"{above}{node.module or ''}".rstrip("."), *(f".{alias.name}" for alias in node.names)]
            paths = [names[0] + name for name in names[1:]]
        else:
            paths = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for path in paths:
            package, *parts = path.split(".")
            if package == "s2o_compile" and parts:
                yield parts[0]


@pytest.mark.parametrize("part", NEVER)
def test_imports(part: str) -> None:
    folder = ROOT / part if part == "benchmarks" else ROOT / "s2o_compile" / part
    files = list(folder.rglob("*.py"))
    assert files
    for file in files:
        assert not NEVER[part] & set(imported(file)), file
