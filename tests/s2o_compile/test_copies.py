"""Copies of the package that are not installed: a folder among other code, a zip file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from s2o_compile.version import VERSION, fingerprint

ROOT = Path(__file__).parents[2]
USE = """
import torch

def causal(q):
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

q = torch.randn(1, 2, 64, 16)
with torch.no_grad():
    output = torch.compile(causal, backend="s2o", options={"min_length": 0, "threshold": 0.0})(q)
torch.testing.assert_close(output, causal(q), atol=1e-4, rtol=1e-4)
import s2o_compile
from s2o_compile.version import fingerprint
assert torch._dynamo.lookup_backend("s2o") is s2o_compile.s2o
assert torch._dynamo.list_backends().count("s2o") == 1
assert s2o_compile.s2o.report.rewritten == 1
print(s2o_compile.__file__, s2o_compile.__version__, fingerprint())
"""
WITHOUT_INDUCTOR = """
import torch._inductor.compile_fx as inductor
inductor.compile_fx = lambda module, inputs, **options: module.forward
"""
LOOK_UP = """
import importlib
import torch
import s2o_compile
assert torch._dynamo.lookup_backend("s2o") is s2o_compile.s2o
assert torch._dynamo.list_backends().count("s2o") == 1
importlib.reload(s2o_compile)
print(s2o_compile.__file__)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with the package as a wheel has it, without its benchmarks."""
    package = tmp_path / "copy" / "s2o_compile"
    left_out = shutil.ignore_patterns("__pycache__", "ops", "passes", "benchmarks")
    shutil.copytree(ROOT / "s2o_compile", package, ignore=left_out)
    for part in ("ops", "passes"):
        shutil.copytree(ROOT / part, package / part, ignore=left_out)
    return tmp_path / "copy"


@pytest.fixture
def others(tmp_path: Path) -> Path:
    """A folder with all that is installed but this package."""
    folder = tmp_path / "others"
    folder.mkdir()
    for item in Path(sysconfig.get_path("purelib")).iterdir():
        if "s2o" not in item.name:
            (folder / item.name).symlink_to(item)
    return folder


def run(program: str, *paths: Path) -> list[str]:
    """The words that a program prints that finds packages in `paths` alone."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-S", "-W", "ignore", "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=paths[-1])
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("kind", ["folder", pytest.param("zip", marks=pytest.mark.slow)])
def test_a_copy(kind: str, copy: Path, others: Path) -> None:
    if kind == "zip":
        copy = Path(shutil.make_archive(str(copy), "zip", copy))
    program = f"import s2o_compile\n{USE}" if kind == "zip" else f"import s2o_compile\n{WITHOUT_INDUCTOR}{USE}"
    found, version, digest = run(program, copy, others)
    assert found.startswith(str(copy)) and version == VERSION and digest == fingerprint()


@pytest.mark.parametrize("before", [pytest.param("", marks=pytest.mark.slow), "import torch._dynamo"])
def test_a_copy_is_registered_in_any_order_of_imports(before: str, copy: Path, others: Path) -> None:
    assert run(f"{before}\n{LOOK_UP}", copy, others)[0].startswith(str(copy))


@pytest.mark.parametrize(
    "before",
    [
        *(pytest.param(before, marks=pytest.mark.slow) for before in ("", "import s2o_compile")),
        "import torch; torch._dynamo.lookup_backend('s2o')",
    ],
)
def test_an_installed_package_is_registered_once(before: str, copy: Path, others: Path) -> None:
    metadata = copy / f"s2o_compile-{VERSION}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: s2o-compile\nVersion: {VERSION}\n")
    (metadata / "entry_points.txt").write_text("[torch_dynamo_backends]\ns2o = s2o_compile:s2o\n")
    assert run(f"{before}\n{LOOK_UP}", copy, others)[0].startswith(str(copy))


def test_the_digest_follows_the_code(copy: Path, others: Path) -> None:
    """That of a copy which is the same is the same, as `test_a_copy` has it."""
    with open(copy / "s2o_compile" / "ops" / "dense.py", "a") as file:
        file.write("# another release\n")
    program = "from s2o_compile.version import fingerprint; print(fingerprint())"
    assert run(program, copy, others) != [fingerprint()]
