"""What the command lines of the benchmarks share."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.console import Console

from s2o_compile.cli.errors import UsageError
from s2o_compile.demo.errors import DemoError


def run(main: Callable[..., None]) -> None:
    """Run `main` on the process's arguments; what the user did wrong is one sentence on stderr and exit code 2."""
    try:
        typer.run(main)
    except (DemoError, UsageError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def wide_console() -> Console:
    """A console for stdout that has room for wide tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
