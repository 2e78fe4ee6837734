"""The text in which values are hidden."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from s2o_compile.testbed.document import read_texts

from .tasks import pairs

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
"""RULER's."""
AT_ONCE = 64
"""Sentences, or pairs, of a piece."""


def text(rng: random.Random, path: Path | None) -> Iterator[str]:
    """A text file, or the sources of Python's standard library: all of it, from a piece chosen by chance on."""
    pieces = list(read_texts(path))
    start = rng.randrange(max(1, len(pieces)))
    return itertools.chain(pieces[start:], pieces[:start])


def noise(rng: random.Random, path: Path | None) -> Iterator[str]:
    """RULER's sentences, again and again."""
    return itertools.repeat(NOISE * AT_ONCE)


def json_pairs(rng: random.Random, path: Path | None) -> Iterator[str]:
    """Pairs of keys and values, without end."""
    endless = pairs(rng)
    return ("".join(itertools.islice(endless, AT_ONCE)) for _ in itertools.count())


FILLERS: dict[str, Callable[[random.Random, Path | None], Iterator[str]]] = {
    "text": text,
    "noise": noise,
    "pairs": json_pairs,
}
"""Pieces of filler by kind, from a source of chance and the file that "text" reads."""
