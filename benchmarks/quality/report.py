"""What the outcomes of many documents say together: figures, tables and plain data."""

from __future__ import annotations

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
from .flips import Flips
from .run import Outcome
from .tasks import TASKS

ALL = "all"
SIGNIFICANT = 0.05
LEGEND = (
    "-a +b: a of the values that dense attention finds are lost, and b that it does not find are found; p: McNemar's "
    f"exact test of the prompts that lose and gain values; *: p below {SIGNIFICANT}. Nats: minus the logarithm of a "
    "value's probability; the mean with dense attention, and what a method adds. Seconds: medians; the rules of others "
    "choose in PyTorch here, which is not timed."
)

MEASURES: dict[str, tuple[str, str | None]] = {
    "density": ("share", None),
    "work": ("share of dense FLOPs", None),
    "perplexity": ("", None),
    "perplexity_ratio": ("times dense", None),
    "agreement": ("share", None),
    "prefill_seconds": ("s", None),
    "attention_seconds": ("s", None),
    "found": ("values", None),
    "lost": ("values", None),
    "gained": ("values", None),
    "p_value": ("", None),
    "nats_a_value": ("nats", None),
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
        prefill_seconds: Median over the documents; None for the rules of others, which choose in PyTorch here.
        attention_seconds: The same of the attention in it.
    """

    length: int
    method: str
    density: float
    ranking: float
    perplexity: float | None
    perplexity_ratio: float | None
    agreement: float | None
    scored: int
    prefill_seconds: float | None
    attention_seconds: float | None

    @property
    def work(self) -> float:
        """Total work as a share of dense attention's."""
        return self.density + self.ranking


@dataclass(frozen=True)
class Lookups:
    """Values of a task, or of all together, that a method finds at one place of documents of one length."""

    length: int
    task: str
    place: str
    method: str
    prompts: int
    flips: Flips


Pairs = list[tuple[Outcome, Outcome]]
"""What a method and dense attention make of the same documents."""


def pairs(outcomes: list[Outcome]) -> dict[tuple[int, str], Pairs]:
    """By length and method, dense attention first; documents that it has not read are left out."""
    dense = {outcome.key[1:]: outcome for outcome in outcomes if outcome.method == DENSE}
    methods = dict.fromkeys([DENSE, *(outcome.method for outcome in outcomes)])
    lengths = sorted({outcome.length for outcome in outcomes})
    found: dict[tuple[int, str], Pairs] = {(length, method): [] for length in lengths for method in methods}
    for outcome in outcomes:
        if outcome.key[1:] in dense:
            found[outcome.length, outcome.method].append((outcome, dense[outcome.key[1:]]))
    return {key: own for key, own in found.items() if own}


def summarise(outcomes: list[Outcome]) -> list[Summary]:
    """Every method at every length, dense attention first."""
    return [_summary(length, method, own) for (length, method), own in pairs(outcomes).items()]


def _summary(length: int, method: str, own: Pairs) -> Summary:
    scored = sum(outcome.scored for outcome, _ in own)
    loss, dense = (sum(pair[place].loss for pair in own) / max(1, scored) for place in (0, 1))
    return Summary(
        length,
        method,
        statistics.fmean(outcome.density for outcome, _ in own),
        statistics.fmean(outcome.ranking for outcome, _ in own),
        perplexity=math.exp(loss) if scored else None,
        perplexity_ratio=math.exp(loss - dense) if scored else None,
        agreement=sum(outcome.agreed for outcome, _ in own) / scored if scored else None,
        scored=scored,
        prefill_seconds=_median([outcome.prefill_seconds for outcome, _ in own]),
        attention_seconds=_median([outcome.attention_seconds for outcome, _ in own]),
    )


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def count_lookups(outcomes: list[Outcome]) -> list[Lookups]:
    """The values that every method finds, by length, task and place, and those of all tasks."""
    counts = []
    for (length, method), own in pairs(outcomes).items():
        by_task = {task: some for task in TASKS if (some := [pair for pair in own if pair[0].task == task])}
        if len(by_task) > 1:
            by_task[ALL] = own
        for task, some in by_task.items():
            for place in PLACES:
                flips = sum((Flips.of(*pair, place) for pair in some), Flips())
                counts.append(Lookups(length, task, place, method, len(some), flips))
    return counts


def tables(outcomes: list[Outcome]) -> Iterator[Table]:
    """For every length, tables of text and work, of values found and of nats (`LEGEND` says how they count)."""
    summaries, lookups = summarise(outcomes), count_lookups(outcomes)
    for length in dict.fromkeys(one.length for one in summaries):
        yield _text_table([one for one in summaries if one.length == length])
        own = [one for one in lookups if one.length == length]
        yield _lookup_table(own, f"{length:,} tokens: values found", _found_cell)
        yield _lookup_table(own, f"{length:,} tokens: nats a value", _nats_cell)


def as_dict(outcomes: list[Outcome], settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Everything as a result: a row for each summary and each count of values."""
    rows = [asdict(one) | {"work": one.work} for one in summarise(outcomes)]
    rows += [_row(one) for one in count_lookups(outcomes)]
    return record("quality", rows, ("length", "task", "place", "method"), MEASURES, device, settings)


def _row(one: Lookups) -> dict[str, Any]:
    fields, flips = asdict(one), one.flips
    del fields["flips"]
    figures = {"found": flips.found, "p_value": flips.p_value, "nats_a_value": flips.nats / max(1, flips.asked)}
    return fields | asdict(flips) | figures


def _text_table(summaries: list[Summary]) -> Table:
    first = summaries[0]
    title = f"{first.length:,} tokens: work, time, and perplexity over {first.scored:,} tokens of text"
    table = _table(title, "")
    for name in ("density", "work", "prefill, s", "attention, s", "perplexity", "to dense", "agree"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in summaries:
        times = ("-" if x is None else f"{x:.3f}" for x in (one.prefill_seconds, one.attention_seconds))
        work = (f"{one.density:.3f}", f"{one.work:.3f}", *times)
        if one.perplexity is None or one.perplexity_ratio is None:
            table.add_row(one.method, *work, "-", "-", "-")
            continue
        change = "" if one.method == DENSE else f"{one.perplexity_ratio - 1:+.2%}"
        table.add_row(one.method, *work, f"{one.perplexity:.3f}", change, f"{one.agreement:.1%}")
    return table


def _lookup_table(lookups: list[Lookups], title: str, cell: Any) -> Table:
    table = _table(title, "task", "asked", "prompts")
    methods = dict.fromkeys(one.method for one in lookups)
    for method in methods:
        table.add_column(method, justify="right")
    cells = {(one.task, one.place, one.method): one for one in lookups}
    for place in PLACES:
        for task in (*TASKS, ALL):
            row = {method: cells[task, place, method] for method in methods if (task, place, method) in cells}
            if row:
                figures = (cell(row[method]) if method in row else "" for method in methods)
                table.add_row(task, place, str(row[DENSE].prompts), *figures)
    return table


def _table(title: str, *left: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True)
    return table


def _found_cell(one: Lookups) -> str:
    flips = one.flips
    if one.method == DENSE:
        return f"{flips.found} of {flips.asked}"
    if one.task == ALL:
        return f"-{flips.lost} +{flips.gained}, p {flips.p_value:.2g}"
    return f"-{flips.lost} +{flips.gained}{'*' if flips.p_value < SIGNIFICANT else ''}"


def _nats_cell(one: Lookups) -> str:
    flips = one.flips
    if one.method == DENSE:
        return f"{flips.nats / max(1, flips.asked):.2f}"
    return f"{(flips.nats - flips.nats_dense) / max(1, flips.asked):+.2f}"
