"""Runs command lines: what the user did wrong is one sentence, and a defect a traceback."""

from __future__ import annotations

import errno
import sys
import warnings

import typer

from ._console import UsageError
from .writing import WriteError

INTERRUPTED = 130
"""What shells say of a process that SIGINT ended, and typer of one that it interrupted."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(command: typer.Typer, name: str | None = None, arguments: list[str] | None = None) -> None:
    """Run a command line; what the user did wrong is one sentence on stderr and exit code 2.

    Args:
        command: What to run.
        name: What it is called, which such a sentence begins with; None for what the process was started as, which it
            does not begin with.
        arguments: Instead of the process's own.
    """
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # PyTorch's, and no command needs it
    try:
        code = command(arguments, prog_name=name, standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        _complain(name, message)
        sys.exit(2)
    if code == INTERRUPTED:
        _complain(name, "interrupted.")
    sys.exit(code)


def _complain(name: str | None, message: str) -> None:
    print(f"{name}: {message}" if name else message, file=sys.stderr)


def _user_message(error: Exception) -> str | None:
    """One sentence for what the user can change; None for a defect of the program."""
    if hasattr(error, "format_message"):
        return error.format_message()
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("s2o_compile"):
        return f"This needs the package {error.name}: pip install 's2o-compile[demo]'."
    calibration = sys.modules.get("s2o_compile.calibration.file")
    cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
    if calibration is not None and isinstance(cause, calibration.CalibrationError):
        return f"{cause}."
    if isinstance(cause, WriteError) or (isinstance(cause, OSError) and cause.errno in _FULL):
        return f"{cause.filename or 'The output'} cannot be written: {cause.strerror}."
    from .ops.memory import is_out_of_memory

    return "There is not enough memory: use a smaller --length." if is_out_of_memory(cause) else None
