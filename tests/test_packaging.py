"""The wheel holds every module, and the package works without the packages that only its command line needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RENAMED = ("benchmarks", "ops", "passes")
WITHOUT = "import sys; sys.modules.update(rich=None, typer=None)\n"
USE = """
import torch
import torch._inductor.compile_fx as inductor
import s2o_compile
from s2o_compile import S2OConfig

def causal(q):
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

inductor.compile_fx = lambda module, inputs, **options: module.forward  # or it takes minutes
q = torch.randn(1, 2, 64, 16)
config = S2OConfig(min_length=0, threshold=0.0)
backend = s2o_compile.s2o.with_config(config)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(causal, backend=backend)(q), causal(q), atol=1e-4, rtol=1e-4)
    with s2o_compile.profile() as profile:
        s2o_compile.attention(q, q, q, is_causal=True, config=config)
report = s2o_compile.explain(causal, q, config=config)
for found in (report, backend.report):
    assert "1 of 1 attention sites rewritten" in str(found)
assert '"calls": 1' in str(profile)
"""


def modules(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*.py")}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from: `pip wheel` writes into the folder that it builds."""
    copy = tmp_path / "checkout"
    without = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for folder in RENAMED:
        shutil.copytree(ROOT / folder, copy / folder, ignore=without)
    # Without the links to the three folders that an editable installation may have put there.
    shutil.copytree(ROOT / "s2o_compile", copy / "s2o_compile", ignore=shutil.ignore_patterns("__pycache__", *RENAMED))
    for file in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.mark.parametrize("linked", [False, True])
def test_the_wheel_holds_every_module(linked: bool, checkout: Path, tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "77")
    nested = checkout / "passes" / "nested_folder" / "inner"
    nested.mkdir(parents=True)
    for folder in (nested.parent, nested):
        (folder / "__init__.py").touch()
    want = modules(checkout / "s2o_compile")
    want |= {os.path.join(folder, name) for folder in RENAMED for name in modules(checkout / folder)}
    for folder in RENAMED * linked:
        (checkout / "s2o_compile" / folder).symlink_to(checkout / folder)
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", *options, str(checkout)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.removeprefix("s2o_compile/") for name in names if name.endswith(".py")} == want
    assert "s2o_compile/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"s2o_compile", f"{wheel.name.split('-py3')[0]}.dist-info"}


def test_what_serves_needs_no_rich_and_no_typer() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT + USE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_line_says_what_is_missing() -> None:
    code = f"{WITHOUT}from s2o_compile.cli import main; main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == "s2o: The command line needs rich and typer: pip install 's2o-compile[cli]'.\n"
