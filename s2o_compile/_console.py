"""What a person reads in a terminal: progress, tables as text, and one sentence for what cannot be done.

Libraries use this too, so rich, which only command lines need, is imported where it is used.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


class UsageError(Exception):
    """What was asked for cannot be done; the message is one sentence that says why, and what to do."""


class Tabular(Protocol):
    """Results that have a table."""

    def to_dict(self) -> dict[str, Any]:
        """The results in types that JSON has."""

    def __rich__(self) -> Table:
        """The table."""


def as_text(results: Tabular) -> str:
    """The table of some results as plain text; without rich, their JSON."""
    console = _console(width=140)
    if console is None:
        return json.dumps(results.to_dict(), indent=2)
    with console.capture() as capture:
        console.print(results)
    return capture.get()


class Progress:
    """Shows each step while it runs and its time when it is done, on stderr; nothing without rich.

    Args:
        shown: Whether to write anything.
    """

    def __init__(self, shown: bool = True) -> None:
        # The stream itself, not whatever stands in for it while a library is kept quiet.
        self._console = _console(file=sys.stderr) if shown else None

    def note(self, text: str) -> None:
        """Say something that is not a step."""
        if self._console is not None:
            self._console.print(text)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """Show a step with its elapsed time.

        Yields:
            A function ``update(name=None, done=None, total=None)``, for steps that know how far they are.
        """
        console = self._console
        if console is None:
            yield lambda *args, **kwargs: None
            return
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        start = time.perf_counter()
        with Bars(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(name, total=None)

            def update(text: str | None = None, done: int | None = None, total: int | None = None) -> None:
                bars.update(task, description=text, completed=done, total=total)

            yield update
        console.print(f"{name}: {time.perf_counter() - start:.1f} s", highlight=False)


def _console(**options: Any) -> Console | None:
    """A console of rich; None where rich is not installed."""
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(**options)
