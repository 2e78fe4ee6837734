"""Writes files whole or not at all, or by lines, and says beforehand if one can be written, as contents take long."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteError(OSError):
    """A file could not be written; `filename` says which, and `strerror` why."""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file, which until then stays what it was.

    Raises:
        WriteError: It cannot be written.
    """
    with replacing(path) as place:
        place.write_text(text, encoding="utf-8")


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Add to the end of a file, of which what was there stays; of `text` only the beginning may, if the disk is full.

    Raises:
        WriteError: It cannot be written.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write what takes the place of a file when it is whole, or a device or pipe to write into.

    The old file, if there is one, survives errors, a full disk and the end of the process. Of several processes that
    write one file the last one wins.

    Yields:
        The path of a file in the same folder, with the same suffix.

    Raises:
        WriteError: It cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if target.exists() and not target.is_file():
            yield target
            return
        place = target.with_name(f".{target.stem}-{secrets.token_hex(8)}{target.suffix}")
        try:
            yield place
            _put(place, target)
        except BaseException:
            place.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(error.errno, error.strerror, str(path)) from error


def _put(place: Path, target: Path) -> None:
    """Move a file to where another may be, once the disk holds it."""
    if target.exists():
        shutil.copymode(target, place)
    with place.open("rb") as file:
        os.fsync(file.fileno())
    place.replace(target)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Open what would be written, and leave everything as it was.

    Raises:
        OSError: It cannot be written: its folder is missing or not to be written into, it is a folder, or it is not
            allowed.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        target.open("ab").close()
    if target.is_file() or not target.exists():
        tempfile.TemporaryFile(dir=target.parent).close()
