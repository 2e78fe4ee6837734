"""The website builds without a warning, needs no network, and says what the program says."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")

from benchmarks.pages import pages
from benchmarks.zoo.__main__ import row
from benchmarks.zoo.architectures import ARCHITECTURES, calls
from benchmarks.zoo.diffusion import DIFFUSION
from benchmarks.zoo.report import markdown
from s2o_compile import Ranking, S2OConfig
from s2o_compile.cli.app import app
from s2o_compile.cli.bench import BENCHMARKS

from .conftest import ROOT

DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(DOCS).with_suffix(".html")) for page in pages() if DOCS in page.parents} - {"zoo.html"}
LOADED = re.compile(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=\"([^\"]+)\"|<link\b[^>]*?\bhref=\"([^\"]+)\"")
IMPORTED = re.compile(r"url\(\s*[\"']?(?:https?:)?//|@import\s+[\"'](?:https?:)?//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(folder / "doctrees")]
    done = subprocess.run([*command, str(ROOT / "docs"), str(folder / "html")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "html"


def test_every_page_is_there(site: Path) -> None:
    assert {str(page.relative_to(site)) for page in site.rglob("*.html")} >= PAGES


def test_nothing_is_loaded_from_a_network(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = {"".join(found) for found in LOADED.findall(page.read_text(encoding="utf-8"))}
        assert loaded and not [link for link in loaded if re.match(r"(https?:)?//|/", link)], page
        for link in loaded - {"#"}:
            assert (page.parent / link.split("?")[0].split("#")[0]).exists(), f"{page.name}: {link}"
    assert not [sheet for sheet in site.rglob("*.css") if IMPORTED.search(sheet.read_text(encoding="utf-8"))]


def test_every_option_and_command_is_there(site: Path) -> None:
    page = (site / "options.html").read_text(encoding="utf-8")
    for field in dataclasses.fields(S2OConfig):
        assert f'id="s2o_compile.S2OConfig.{field.name}"' in page
    for field in dataclasses.fields(Ranking):
        assert f'id="s2o_compile.Ranking.{field.name}"' in page
    for command in app.registered_commands:
        assert command.callback is not None
        assert f'id="s2o-{command.callback.__name__}"' in page
    for name in BENCHMARKS:
        assert f'id="s2o-bench-{name}"' in page


def test_the_table_of_models_is_what_the_zoo_finds() -> None:
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in committed_table()[2:]}
    assert lines.keys() == (ARCHITECTURES | DIFFUSION).keys()
    sample = ["mpnet", "vit"]
    found = markdown(row(*call) for call in calls({name: ARCHITECTURES[name] for name in sample})).splitlines()
    assert list(map(without_difference, found[2:])) == [without_difference(lines[name]) for name in sample]
    assert found[:2] == committed_table()[:2]


def committed_table() -> list[str]:
    return (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8").splitlines()


def without_difference(line: str) -> list[str]:
    """The cells of a line, but for the one that the machine decides."""
    cells = line.split(" | ")
    return cells[:4] + cells[5:]
