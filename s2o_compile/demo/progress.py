"""Progress of the demo on the terminal's error stream."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars


class Progress:
    """Shows each step while it runs and its time when it is done; keeps silent when not `shown`.

    Args:
        shown: Whether to write anything.
    """

    def __init__(self, shown: bool = True) -> None:
        # The stream itself, not whatever stands in for it while a library is kept quiet.
        self._console = Console(file=sys.stderr, quiet=not shown)

    def note(self, text: str) -> None:
        """Say something that is not a step."""
        self._console.print(text)

    @contextmanager
    def step(self, name: str) -> Iterator[Callable[..., None]]:
        """Show a step with its elapsed time.

        Yields:
            A function ``update(name=None, done=None, total=None)``, for steps that know how far they are.
        """
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        start = time.perf_counter()
        with Bars(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bars:
            task = bars.add_task(name, total=None)

            def update(text: str | None = None, done: int | None = None, total: int | None = None) -> None:
                bars.update(task, description=text, completed=done, total=total)

            yield update
        self._console.print(f"{name}: {time.perf_counter() - start:.1f} s", highlight=False)
