"""The layout of the package: what may import what, and that no modules import each other in a circle."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"s2o_compile.ops": ROOT / "ops", "s2o_compile.passes": ROOT / "passes", "s2o_compile": ROOT / "s2o_compile"}
"""Where the modules of a package are, the lowest package first."""
PARTS_OF_PASSES = ("graph", "mask", "match")
"""The folders of the passes, the lowest first; what is beside them is above them."""


def path_of_module(module: str) -> Path | None:
    """The file of a module of the package; None if it is none."""
    package = next((name for name in PACKAGES if f"{module}.".startswith(f"{name}.")), None)
    if package is None:
        return None
    path = PACKAGES[package].joinpath(*module.removeprefix(package).split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def modules() -> dict[str, ast.Module]:
    """The modules of all packages, by name."""
    found: dict[str, ast.Module] = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found.setdefault(".".join((package, *parts)), ast.parse(path.read_text()))
    return found


def is_package(module: str) -> bool:
    path = path_of_module(module)
    return path is not None and path.name == "__init__.py"


def imports(module: str, tree: ast.Module) -> set[str]:
    """The modules of the package that a module imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            base = parts[: len(parts) - node.level + is_package(module)] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            submodules = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if path_of_module(name) else source for name in submodules]
        found |= {name for name in names if path_of_module(name)}
    return found - {module}


def rank_of_package(module: str) -> int:
    return next(rank for rank, name in enumerate(PACKAGES) if f"{module}.".startswith(f"{name}."))


def rank_in_passes(module: str) -> int:
    part = module.removeprefix("s2o_compile.passes").removeprefix(".").split(".")[0]
    return PARTS_OF_PASSES.index(part) if part in PARTS_OF_PASSES else len(PARTS_OF_PASSES)


def test_no_package_imports_a_higher_one() -> None:
    for module, tree in modules().items():
        for name in imports(module, tree):
            assert rank_of_package(name) <= rank_of_package(module), f"{module} imports {name}"


def test_no_part_of_the_passes_imports_a_higher_one() -> None:
    for module, tree in modules().items():
        for name in imports(module, tree) if module.startswith("s2o_compile.passes.") else ():
            if name.startswith("s2o_compile.passes"):
                assert rank_in_passes(name) <= rank_in_passes(module), f"{module} imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    inside = {name: tree for name, tree in modules().items() if f"{name}.".startswith(f"{package}.")}
    order = TopologicalSorter({name: imports(name, tree) & inside.keys() for name, tree in inside.items()})
    order.prepare()
