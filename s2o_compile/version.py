"""The release, and what tells its code from that of others; a copy without package metadata has both."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
from collections.abc import Iterator
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

VERSION = "0.2.0"
"""The release; the packaging reads it here."""


@functools.cache
def fingerprint() -> str:
    """The release, and a digest of the code that decides what is compiled, as far as its source is at hand."""
    package = __name__.rpartition(".")[0]
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        parts = (_sources(files(f"{package}.{part}")) for part in ("ops", "passes"))
        for source in (files(package) / "backend.py", *itertools.chain.from_iterable(parts)):
            digest.update(source.read_bytes())
    return f"{VERSION}-{digest.hexdigest()[:16]}"


def _sources(folder: Traversable) -> Iterator[Traversable]:
    """The Python files below a folder, always in the same order."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _sources(item)
        elif item.name.endswith(".py"):
            yield item
