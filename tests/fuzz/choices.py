"""Choices that repeat from a seed, and the least of them with which something still happens."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Choices:
    """Chooses what is given, then at random, or the first option where there is no seed.

    Attributes:
        seed: Of the random choices.
        given: Indices of the first choices.
        made: Indices of all choices so far.
    """

    seed: int | None = None
    given: Sequence[int] = ()
    made: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def __call__(self, options: Sequence[Any]) -> Any:
        place = len(self.made)
        if place < len(self.given):
            index = min(self.given[place], len(options) - 1)
        else:
            index = 0 if self.seed is None else self.random.randrange(len(options))
        self.made.append(index)
        return options[index]


def shrink(choices: Sequence[int], still: Callable[[Choices], bool], seconds: float) -> list[int]:
    """The simplest choices found in so many seconds with which `still` holds: most of them the first option.

    Args:
        choices: Indices with which it holds.
        still: Draws from choices and says whether what was drawn still behaves in the same way.
        seconds: When to be content.
    """
    best, end = list(choices), time.monotonic() + seconds
    size = max(len(best) // 2, 1)
    while size:
        place, improved = 0, False
        while place < len(best):
            candidate = [*best[:place], *[0] * len(best[place : place + size]), *best[place + size :]]
            if any(best[place : place + size]):
                tried = Choices(given=candidate)
                if still(tried) and _weight(tried.made) < _weight(best):
                    best, improved = tried.made, True
                if time.monotonic() > end:
                    return best
            place += size
        size = size if improved and size == 1 else size // 2
    return best


def _weight(choices: Sequence[int]) -> tuple[int, int]:
    """How far choices are from the simplest."""
    return sum(index > 0 for index in choices), len(choices)
