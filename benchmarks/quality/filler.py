"""The text in which values are hidden."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import read_texts

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
"""RULER's."""
AT_ONCE = 64
"""Sentences of a piece."""


def code(rng: random.Random, path: Path | None) -> Iterator[str]:
    """The sources of Python's standard library."""
    return _from_anywhere(rng, list(read_texts(None)))


def prose(rng: random.Random, path: Path | None) -> Iterator[str]:
    """The language reference that Python carries for its help, a page a piece."""
    return _from_anywhere(rng, _language_reference())


def document(rng: random.Random, path: Path | None) -> Iterator[str]:
    """A text file."""
    return _from_anywhere(rng, list(read_texts(path)))


def noise(rng: random.Random, path: Path | None) -> Iterator[str]:
    """RULER's sentences, again and again."""
    return itertools.repeat(NOISE * AT_ONCE)


FILLERS: dict[str, Callable[[random.Random, Path | None], Iterator[str]]] = {
    "code": code,
    "prose": prose,
    "noise": noise,
    "document": document,
}
"""Pieces of filler by kind, from a source of chance and the file that "document" reads."""
TEXTS = ("code", "prose", "document")
"""The kinds that perplexity is measured on."""


def vocabulary(rng: random.Random) -> list[str]:
    """The English words of 4 to 10 letters in the language reference, each once, in an order of chance."""
    words = sorted(set(re.findall(r"\b[a-z]{4,10}\b", " ".join(_language_reference()))))
    return rng.sample(words, len(words))


def _language_reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        raise UsageError("Prose needs pydoc_data, which this Python lacks: give --document, or leave it out.") from None
    return [f"{page}\n\n" for _, page in sorted(topics.items())]


def _from_anywhere(rng: random.Random, pieces: list[str]) -> Iterator[str]:
    """All pieces, from one chosen by chance on."""
    start = rng.randrange(max(1, len(pieces)))
    return itertools.chain(pieces[start:], pieces[:start])
