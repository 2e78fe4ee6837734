"""Actions that wait for another package's import."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from s2o_compile.after_import import after_import


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of a package, both not imported yet, whose value doubles while it is imported."""
    name = f"package_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "inner.py").write_text("value = 1\nvalue *= 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return f"{name}.inner"


def test_waits_for_the_import_and_acts_once(module: str) -> None:
    seen: list[int] = []
    finders = list(sys.meta_path)
    after_import(module, lambda: seen.append(sys.modules[module].value))
    assert importlib.util.find_spec(module) is not None and not seen, "looking for a module is no import"
    importlib.import_module(module)
    assert seen == [2]
    assert sys.meta_path == finders
    importlib.reload(sys.modules[module])
    assert seen == [2]


def test_acts_at_once_on_what_is_imported(module: str) -> None:
    importlib.import_module(module)
    seen: list[str] = []
    after_import(module, lambda: seen.append(module))
    assert seen == [module]


def test_two_wait_for_the_same_module(module: str) -> None:
    seen: list[int] = []
    after_import(module, lambda: seen.append(1))
    after_import(module, lambda: seen.append(2))
    importlib.import_module(module)
    assert sorted(seen) == [1, 2]


def test_a_module_that_is_not_there() -> None:
    finders = list(sys.meta_path)
    after_import("no_such_package", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_package")
    sys.meta_path[:] = finders


def test_a_watched_module_keeps_its_loader(module: str) -> None:
    after_import(module, lambda: None)
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.loader is not None
    assert "value *= 2" in spec.loader.get_source(module), "the rest of the loader can be used before the import"
    inner = importlib.import_module(module)
    assert isinstance(inner.__loader__, SourceFileLoader) and inner.__spec__.loader is inner.__loader__
