"""What a text hides, and what is asked about it, before it is cut into tokens."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from s2o_compile.testbed.document import MIDDLE

OPENING = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n\n"
)
VALUES = 4
"""Values of a place in all tasks with several, and hops of a chain, as RULER has them."""


@dataclass(frozen=True)
class Fact:
    """A sentence of a text that gives a value, behind a share `depth` of the text."""

    sentence: str
    value: str
    depth: float


@dataclass(frozen=True)
class Question:
    """A question up to its reply, the reply, and the values in it, in order; each counts as one answer."""

    prompt: str
    reply: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a text hides, and what is asked about it.

    Attributes:
        facts: What is hidden.
        middle: What is asked in the middle of the text, which goes on behind.
        end: What is asked at its end, about other values.
        opening: Stands before all of it.
        haystack: Pieces of the text, without end, where the task does not take any text; or two such streams, of what
            lies before the questions in the middle and of what lies behind them.
    """

    facts: Sequence[Fact]
    middle: Sequence[Question]
    end: Sequence[Question]
    opening: str = OPENING
    haystack: tuple[Iterable[str], ...] = ()


@dataclass(frozen=True)
class Task:
    """A task: `plan` makes what one text hides.

    Attributes:
        plan: From a source of chance, the depth of single needles, and the tokens of the document.
        has_depth: Whether the depth matters to it.
        filler: The kind of text it needs; None for any.
    """

    plan: Callable[[random.Random, float, int], Plan]
    has_depth: bool = False
    filler: str | None = None


def even_depths() -> list[float]:
    """Of `VALUES` facts asked for in the middle, then of as many asked for at the end: evenly up to the question."""
    return [(index + 0.5) / VALUES * until for until in (MIDDLE, 1.0) for index in range(VALUES)]


def shuffled(rng: random.Random, questions: Sequence[Question]) -> list[Question]:
    """The questions in an order of chance."""
    return rng.sample(questions, len(questions))


def enumerated(items: Sequence[str]) -> str:
    """The items as a sentence lists them."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])}, and {items[-1]}"
