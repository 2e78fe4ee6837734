"""Every Python block and every command of the README and of the pages runs as written, in order; links lead somewhere.

A block that takes minutes follows a comment ``skip: next if(quick, ...)``; ``-m docs_slow`` runs these too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import unittest
from pathlib import Path

import pytest

pytest.importorskip("sybil")

from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from benchmarks.pages import pages

from .conftest import ROOT

PAGES = pages()
RUN = {"python", "bash"}
SHOWN = {"text", "{eval-rst}", "{include}", "{literalinclude}", "{toctree}"}


def name_of(page: Path) -> str:
    """A page's path, as its tests are called."""
    return str(page.relative_to(ROOT)).removeprefix("docs/")


def is_installed(package: str) -> bool:
    """Whether a package that is an extra is there, for what follows a comment ``skip: next if(not ...)``."""
    return importlib.util.find_spec(package) is not None


def run_commands(example: Example) -> None:
    """Run a block of commands in the current folder, with this Python's programs first."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["bash", "-euo", "pipefail", "-c", example.parsed]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, f"{example.path}:{example.line}\n{example.parsed}\n{done.stdout}{done.stderr}"


PARSERS = [PythonCodeBlockParser(), CodeBlockParser("bash", run_commands), SkipParser()]
SLOW = pytest.param(False, marks=[pytest.mark.docs_slow, pytest.mark.timeout(3600)], id="slow")


@pytest.mark.parametrize("quick", [pytest.param(True, id="quick"), SLOW])
@pytest.mark.parametrize("page", PAGES, ids=name_of)
@pytest.mark.usefixtures("checkout")
def test_blocks_run(page: Path, quick: bool) -> None:
    document = Sybil(parsers=PARSERS).parse(page)
    document.namespace |= {"quick": quick, "is_installed": is_installed}
    for example in document.examples():
        with contextlib.suppress(unittest.SkipTest):
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_say_what_they_are(page: Path) -> None:
    """What has no language, or one that nothing runs, would not be tested."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^ *```(.*)$", text, re.MULTILINE)
    assert {opened.split(" ")[0] for opened in fences[::2]} <= RUN | SHOWN
    assert not any(fences[1::2])
    assert not re.search(r"\n\n    \S", text), "an indented block"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []
