"""Whether a file can be written, asked before the long work whose result it is to hold."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(path: str | os.PathLike[str]) -> None:
    """Open a file for writing, and leave everything as it was.

    Raises:
        OSError: It cannot be written: its folder is missing, it is a folder, or it is not allowed.
    """
    path = Path(path)
    is_new = not path.exists()
    path.open("ab").close()
    if is_new:
        path.unlink()
