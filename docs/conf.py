"""Sphinx: the website made of these pages, which opens from disk without a network."""

from __future__ import annotations

from pathlib import Path

import typer
from sphinx.application import Sphinx
from typer.cli import get_docs_for_click

from s2o_compile.cli.app import app
from s2o_compile.version import VERSION

project = "s2o-compile"
html_title = project
version = release = VERSION
copyright = "the authors of s2o-compile, Apache License 2.0"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated", "zoo.md"]
myst_heading_anchors = 3
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
maximum_signature_line_length = 60

html_theme = "furo"
html_copy_source = False


def write_commands(application: Sphinx) -> None:
    """Write what every command of ``s2o`` says of itself as Markdown, for the page of options to include."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="s2o", indent=1)
    folder = Path(application.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    (folder / "commands.md").write_text(text, encoding="utf-8")


def setup(application: Sphinx) -> None:
    """Connect to the build."""
    application.connect("builder-inited", write_commands)
