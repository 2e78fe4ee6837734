"""The command line itself, with all of its commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ..version import VERSION
from .bench import bench
from .calibrate import calibrate
from .demo import demo
from .doctor import doctor
from .explain import explain
from .tune import tune
from .view import view

app = typer.Typer(help="Sparse long-context attention as a torch.compile backend.", add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"s2o-compile {VERSION}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def group(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sparse long-context attention as a torch.compile backend."""
    if context.invoked_subcommand is None:
        print(context.get_help())


def _help(command: Callable[..., Any]) -> str:
    """A command's docstring, a line for each paragraph: a terminal has other widths than the source."""
    return "\n\n".join(" ".join(text.split()) for text in (inspect.getdoc(command) or "").split("\n\n"))


for command in (calibrate, demo, doctor, explain, tune, view):
    app.command(help=_help(command))(command)
app.add_typer(bench)
