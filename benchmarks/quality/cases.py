"""Documents of exact length for the tasks."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import (
    MIDDLE,
    Document,
    Passage,
    append,
    encode,
    encode_passage,
    first_tokens,
    hide,
    take_tokens,
)

from .filler import FILLERS, TEXTS
from .plan import Fact, Plan, Question
from .tasks import TASKS

PLACES = ("middle", "end")


@dataclass(frozen=True)
class Case:
    """One document of a task.

    Attributes:
        task: A name in `TASKS`.
        sample: Which of the task's documents of this length.
        document: With the values asked for at both places.
        depths: By place, for each value that a fact gives, the share of the text before its question that lies before
            the fact.
    """

    task: str
    sample: int
    document: Document
    depths: dict[str, list[float]]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.document.tokens)


@dataclass(frozen=True)
class Settings:
    """How documents are made.

    Attributes:
        filler: A name in `FILLERS`, for tasks that take any.
        text: The file of "document".
        seed: Of all that is drawn.
        depths: Depths of single needles, from 0 to 1 in even steps, one after the other; tasks begin at different ones.
        scored: The most tokens, of the last stretch of text, to measure perplexity over.
    """

    filler: str = "code"
    text: Path | None = None
    seed: int = 0
    depths: int = 5
    scored: int = 1024


def build_case(tokenizer: Any, task: str, length: int, sample: int, settings: Settings) -> Case:
    """Build the document `sample` of a task: the same one for the same settings and tokenizer.

    Raises:
        UsageError: The text is too short, or the tokenizer gives no offsets.
        UsageError: The length is too small for the task.
    """
    rng = random.Random(f"{settings.seed} {task} {length} {sample}")
    turn = (sample + list(TASKS).index(task)) % settings.depths  # so that few samples have several depths, too
    plan = TASKS[task].plan(rng, turn / max(1, settings.depths - 1), length)
    kind = TASKS[task].filler or settings.filler
    scored = settings.scored if kind in TEXTS and not plan.haystack else 0
    haystack = plan.haystack or (FILLERS[kind](rng, settings.text),)
    document = build_document(tokenizer, task, plan, haystack, length, scored)
    depth = {fact.value: fact.depth for fact in plan.facts}
    before = {"middle": MIDDLE, "end": 1.0}
    depths = {
        place: [
            round(depth[value] / before[place], 6)
            for asked in getattr(plan, place)
            for value in asked.values
            if value in depth
        ]
        for place in PLACES
    }
    return Case(task, sample, document, depths)


def build_document(
    tokenizer: Any, task: str, plan: Plan, haystack: Sequence[Iterable[str]], length: int, scored: int
) -> Document:
    """Build a document of exactly `length` tokens.

    Args:
        tokenizer: A fast transformers tokenizer.
        task: Its name, for what is refused.
        plan: What is hidden in it, and asked.
        haystack: Pieces of all the text, or of the text before and behind the questions in the middle.
        length: Tokens.
        scored: The most tokens that perplexity is measured over.

    Raises:
        UsageError: The text is too short, or the tokenizer gives no offsets.
        UsageError: `length` is too small for what is to be hidden and asked.
    """
    facts = {fact: Passage(encode(tokenizer, fact.sentence), []) for fact in plan.facts}
    middle, end = ([_encode_question(tokenizer, question) for question in asked] for asked in (plan.middle, plan.end))
    start = first_tokens(tokenizer) + encode(tokenizer, plan.opening)
    taken = len(start) + sum(len(passage.tokens) for passage in [*facts.values(), *middle, *end])
    if length < 2 * taken:
        raise UsageError(f"--length must be at least {2 * taken:,} for the task {task}, not {length:,}.")
    before, behind = _take_haystack(tokenizer, haystack, length - taken, length)
    tokens = start + _hide_facts(before, facts, 0, MIDDLE)
    middle_spans = [span for passage in middle for span in append(tokens, passage)]
    tokens += _hide_facts(behind, facts, MIDDLE, 1)
    deepest = max([MIDDLE, *(fact.depth for fact in facts)])
    uninterrupted = int((1 - deepest) * (length - taken))
    last = range(len(tokens) - min(scored, uninterrupted), len(tokens))
    end_spans = [span for passage in end for span in append(tokens, passage)]
    return Document(tokens, middle_spans, end_spans, last)


def _take_haystack(
    tokenizer: Any, haystack: Sequence[Iterable[str]], wanted: int, length: int
) -> tuple[list[int], list[int]]:
    """The tokens of the text before the questions in the middle, and of that behind them."""
    split = int(wanted * MIDDLE)
    if len(haystack) == 1:
        text = take_tokens(tokenizer, haystack[0], wanted, length)
        return text[:split], text[split:]
    before, behind = haystack
    return take_tokens(tokenizer, before, split, length), take_tokens(tokenizer, behind, wanted - split, length)


def _hide_facts(text: list[int], facts: dict[Fact, Passage], first: float, last: float) -> list[int]:
    """Hide the facts deeper than `first`, or at 0, up to `last` in what the document has between these depths."""
    chosen = sorted((fact for fact in facts if first < fact.depth <= last or fact.depth == first == 0), key=_depth)
    depths = [(fact.depth - first) / (last - first) for fact in chosen]
    return hide(text, [facts[fact] for fact in chosen], depths)


def _depth(fact: Fact) -> float:
    return fact.depth


def _encode_question(tokenizer: Any, question: Question) -> Passage:
    """The tokens of a question with its reply, and where the values are in it."""
    text, spans = question.prompt + question.reply, []
    done = len(question.prompt)
    for value in question.values:
        start = text.index(value, done)
        done = start + len(value)
        spans.append(range(start, done))
    return encode_passage(tokenizer, text, spans)
