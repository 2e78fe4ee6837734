"""What is measured, and of what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import s2o_compile
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.config import replaced
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH
from s2o_compile.timing import Run

ENGINE, ALONE, REPLAY = "engine", "model alone", "replay"
CONTIGUOUS, VARLEN = "contiguous", "varlen_attn"
STOCK, DENSE, S2O = "stock", "s2o, kept dense", "s2o"
WAYS = (STOCK, DENSE, S2O)
"""What the engine attends with: what transformers chooses, this attention with every request dense, and as set."""


@dataclass(frozen=True)
class Case:
    """What is done at each length.

    Attributes:
        config: The settings of the operator.
        density: The share to visit where inputs are random.
        ways: Which of `WAYS` the engine runs.
        neighbours: Requests that decode beside the long prompt.
        context: Keys of each of them at the start.
        budget: Tokens of a step: the longest part that a prompt is cut into.
        page: Keys of a page of the engine's cache.
        steps: Steps with nothing but decoding that are timed after each long prompt.
        repetitions: Timed calls, or prompts.
        device: Where it runs.
        dtype: Of tensors and weights.
    """

    config: S2OConfig
    density: float
    ways: tuple[str, ...]
    neighbours: int
    context: int
    budget: int
    page: int
    steps: int
    repetitions: int
    device: torch.device
    dtype: torch.dtype

    @property
    def dense_config(self) -> S2OConfig:
        """The settings, with which every call runs dense."""
        return replaced(self.config, min_length=DENSE_AT_ANY_LENGTH)


@dataclass
class Row:
    """One way to attend, to a long prompt or to a part of it.

    Attributes:
        subject: `ENGINE` for a prompt beside requests that decode, `ALONE` for its prefill by the model in one call,
            `REPLAY` for one call of attention.
        length: Tokens of the prompt; keys of its part.
        way: Of `WAYS`; of a replay also `VARLEN`.
        keys: Of a replay, `CONTIGUOUS` or the size of a page; of others, the implementation that transformers ran.
        seconds: To the first token, or of the call; the median.
        spread: Range of the repetitions over their median.
        gain: Time of the fastest dense way of the same subject, length and keys over its own; of `REPLAY`, keys are
            contiguous there.
        of_alone: `gain` over that of the model alone.
        to_contiguous: Time over that with contiguous keys.
        step: Seconds of a step of the engine in which all requests decode; the median.
        step_spread: The middle half of these steps over their median.
        to_stock: `step` over that of `STOCK`.
        sparse: Sparse calls of attention in one prompt or call.
        setting: The threshold of a model, or the diffuseness of the queries of a replay.
        reason: Why it could not run; empty where it did.
    """

    subject: str
    length: int
    way: str
    keys: str = ""
    seconds: float | None = None
    spread: float | None = None
    gain: float | None = None
    of_alone: float | None = None
    to_contiguous: float | None = None
    step: float | None = None
    step_spread: float | None = None
    to_stock: float | None = None
    sparse: int | None = None
    setting: float | None = None
    reason: str = ""


def sparse_calls(run: Run) -> int:
    """How many calls of attention take the sparse path while something runs."""
    with s2o_compile.profile(error_rows=0) as profile:
        run()
    return sum(site.calls for site in profile.sites)


def compare(rows: Sequence[Row]) -> None:
    """Fill in the times of rows of one length that are relative to others."""
    for row in rows:
        own = [other for other in rows if other.subject == row.subject]
        dense = [other.seconds for other in own if other.way != S2O and _is_reference(other) and other.seconds]
        if row.seconds and dense:
            row.gain = min(dense) / row.seconds
        row.to_stock = _ratio(row.step, next((other.step for other in own if other.way == STOCK), None))
        if row.subject == REPLAY:
            whole = next(other.seconds for other in own if other.way == row.way and _is_reference(other))
            row.to_contiguous = _ratio(row.seconds, whole)
    alone = next((row.gain for row in rows if (row.subject, row.way) == (ALONE, S2O)), None)
    for row in rows:
        if (row.subject, row.way) == (ENGINE, S2O):
            row.of_alone = _ratio(row.gain, alone)


def _is_reference(row: Row) -> bool:
    return row.subject != REPLAY or row.keys == CONTIGUOUS


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None
