"""What the command lines of the benchmarks share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, TaskID

from s2o_compile._command_line import run as run_command_line

SPEED_PERIOD = 600.0
"""Seconds of the past that the time left is estimated from, as single steps take very different times."""


def run(main: Callable[..., None]) -> None:
    """Run `main` on the process's arguments; what the user did wrong is one sentence on stderr and exit code 2."""
    benchmark = typer.Typer(add_completion=False)
    benchmark.command()(main)
    run_command_line(benchmark)


def by_device(defaults: Mapping[str, Sequence[int]]) -> str:
    """What the help of an option says of defaults that depend on the device."""
    cpu, gpu = (", ".join(map(str, defaults[kind])) for kind in ("cpu", "cuda"))
    return f"repeatable; by default {cpu} on a CPU and {gpu} on a GPU."


def wide_console() -> Console:
    """A console for stdout that has room for wide tables where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def progress_bars(*columns: ProgressColumn) -> Progress:
    """Progress bars on stderr, those of rich's usual columns without others; none where it is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, speed_estimate_period=SPEED_PERIOD
    )


def announce(progress: Progress, task: TaskID, text: str) -> None:
    """Say what a task is at: beside its bar, or in a line with the time of day where there are no bars."""
    progress.update(task, description=text)
    if progress.disable:
        progress.console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)
