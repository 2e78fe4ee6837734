"""The command line ``s2o``, one command a file; typer and rich are imported when it runs."""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("rich", "typer")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line ``s2o``.

    Args:
        arguments: Instead of the process's own.
    """
    missing = [package for package in _NEEDED if importlib.util.find_spec(package) is None]
    if missing:
        print(f"s2o: The command line needs {' and '.join(missing)}: pip install 's2o-compile[cli]'.", file=sys.stderr)
        sys.exit(2)
    from .._command_line import run
    from .app import app

    run(app, "s2o", arguments)
