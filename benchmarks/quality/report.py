"""What the outcomes of many documents say together: figures, tables and plain data."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from ..results import record
from .attention import DENSE
from .cases import PLACES
from .run import Outcome

LEGEND = "a + b: a of the values that dense attention finds are found, and b that it does not."

MEASURES: dict[str, tuple[str, str | None]] = {
    "density": ("share", None),
    "work": ("share of dense FLOPs", None),
    "perplexity": ("", None),
    "perplexity_ratio": ("times dense", None),
    "agreement": ("share", None),
    "kept": ("values", None),
    "gained": ("values", None),
    "found": ("values", None),
}


@dataclass(frozen=True)
class Summary:
    """A method at one length, all documents together.

    Attributes:
        length: Tokens of a document.
        method: The method.
        density: Mean over layers and documents.
        ranking: The same of the ranking's products.
        perplexity: Over the scored tokens; None where there are none.
        perplexity_ratio: To that of dense attention.
        agreement: Share of the scored tokens predicted to be what dense attention predicts.
        scored: Tokens scored.
    """

    length: int
    method: str
    density: float
    ranking: float
    perplexity: float | None
    perplexity_ratio: float | None
    agreement: float | None
    scored: int

    @property
    def work(self) -> float:
        """Total work as a share of dense attention's."""
        return self.density + self.ranking


@dataclass(frozen=True)
class Lookups:
    """Values of a task that a method finds at one place of documents of one length.

    Attributes:
        length: Tokens of a document.
        task: The task.
        place: "middle" or "end".
        method: The method.
        asked: Values asked for.
        kept: Found by dense attention and by the method.
        gained: Found by the method alone.
    """

    length: int
    task: str
    place: str
    method: str
    asked: int
    kept: int
    gained: int

    @property
    def found(self) -> int:
        """Found by the method."""
        return self.kept + self.gained


def summarise(outcomes: list[Outcome]) -> list[Summary]:
    """Every method at every length, dense attention first."""
    summaries = []
    for length, method in _ordered(outcomes, "length", "method"):
        own = _select(outcomes, length=length, method=method)
        scored = sum(outcome.scored for outcome in own)
        loss, dense = (
            sum(outcome.loss for outcome in some) / max(1, scored)
            for some in (own, _select(outcomes, length=length, method=DENSE))
        )
        summaries.append(
            Summary(
                length,
                method,
                statistics.fmean(outcome.density for outcome in own),
                statistics.fmean(outcome.ranking for outcome in own),
                perplexity=math.exp(loss) if scored else None,
                perplexity_ratio=math.exp(loss - dense) if scored else None,
                agreement=sum(outcome.agreed for outcome in own) / scored if scored else None,
                scored=scored,
            )
        )
    return summaries


def count_lookups(outcomes: list[Outcome]) -> list[Lookups]:
    """The values that every method finds, by length, task and place."""
    counts = []
    for length, task, method in _ordered(outcomes, "length", "task", "method"):
        own = _select(outcomes, length=length, task=task, method=method)
        dense = _select(outcomes, length=length, task=task, method=DENSE)
        for place in PLACES:
            pairs = list(zip(*(_found(some, place) for some in (own, dense)), strict=True))
            kept = sum(here and there for here, there in pairs)
            gained = sum(here and not there for here, there in pairs)
            counts.append(Lookups(length, task, place, method, len(pairs), kept, gained))
    return counts


def tables(outcomes: list[Outcome]) -> Iterator[Table]:
    """For every length, a table of text and work, and one of values found (`LEGEND` says how it counts)."""
    summaries, lookups = summarise(outcomes), count_lookups(outcomes)
    for (length,) in _ordered(outcomes, "length"):
        yield _text_table([one for one in summaries if one.length == length])
        yield _lookup_table([one for one in lookups if one.length == length])


def as_dict(outcomes: list[Outcome], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything as a result: a row for each summary and each count of values, and the outcomes of all documents."""
    rows = [asdict(one) | {"work": one.work} for one in summarise(outcomes)]
    rows += [asdict(one) | {"found": one.found} for one in count_lookups(outcomes)]
    key = ("length", "task", "place", "method")
    return record("quality", rows, key, MEASURES, device, settings, outcomes=[asdict(one) for one in outcomes])


def _text_table(summaries: list[Summary]) -> Table:
    first = summaries[0]
    title = f"{first.length:,} tokens: work, and perplexity over {first.scored:,} tokens of text"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for name in ("density", "work", "perplexity", "to dense", "agree"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in summaries:
        work = (f"{one.density:.3f}", f"{one.work:.3f}")
        if one.perplexity is None or one.perplexity_ratio is None:
            table.add_row(one.method, *work, "-", "-", "-")
            continue
        change = "" if one.method == DENSE else f"{one.perplexity_ratio - 1:+.2%}"
        table.add_row(one.method, *work, f"{one.perplexity:.3f}", change, f"{one.agreement:.1%}")
    return table


def _lookup_table(lookups: list[Lookups]) -> Table:
    title = f"{lookups[0].length:,} tokens: values found"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in ("task", "asked"):
        table.add_column(name, no_wrap=True)
    for method in dict.fromkeys(one.method for one in lookups):
        table.add_column(method, justify="right")
    for place in PLACES:
        total: dict[str, Lookups] = {}
        here = [one for one in lookups if one.place == place]
        for task, row in itertools.groupby(here, lambda one: one.task):
            cells = list(row)
            for one in cells:
                total[one.method] = _add(total.get(one.method), one)
            table.add_row(task, place, *map(_cell, cells))
        if len({one.task for one in here}) > 1:
            table.add_row("all", place, *map(_cell, total.values()))
    return table


def _add(total: Lookups | None, more: Lookups) -> Lookups:
    """Two tasks together."""
    if total is None:
        return more
    counts = (getattr(total, name) + getattr(more, name) for name in ("asked", "kept", "gained"))
    return Lookups(more.length, "all", more.place, more.method, *counts)


def _cell(one: Lookups) -> str:
    return f"{one.found} of {one.asked}" if one.method == DENSE else f"{one.kept} + {one.gained}"


def _found(outcomes: list[Outcome], place: str) -> list[bool]:
    """Whether each value was found, in the order of the documents."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.number)
    return [found for outcome in ordered for found in outcome.found[place]]


def _select(outcomes: list[Outcome], **fields: Any) -> list[Outcome]:
    return [one for one in outcomes if all(getattr(one, name) == value for name, value in fields.items())]


def _ordered(outcomes: list[Outcome], *names: str) -> list[tuple[Any, ...]]:
    """The combinations of fields that occur, in the order in which they do, lengths together."""
    seen = dict.fromkeys(tuple(getattr(outcome, name) for name in names) for outcome in outcomes)
    return sorted(seen, key=lambda combination: combination[0])
