"""What is measured, and of what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from s2o_compile.ops import S2OConfig

OPERATOR = "operator"
HEADS = "heads"
"""As a layout: ranks hold some heads at all positions, as in tensor parallelism."""


@dataclass(frozen=True)
class Case:
    """What all ranks do.

    Attributes:
        subject: `OPERATOR`, or the model that prefills, as `prefill` names it.
        shape: Of the operator, a name in `SHAPES`.
        layers: Of a model of random weights.
        length: Positions of the sequence.
        layout: Which of them a rank holds, or `HEADS`.
        config: The settings of the operator.
        density: The share to visit; None to leave the threshold as it is.
        document: A text file; None for Python's standard library.
        repetitions: Timed calls.
        device: "cpu" or "cuda".
        dtype: Of tensors and weights.
    """

    subject: str
    shape: str
    layers: int
    length: int
    layout: str
    config: S2OConfig
    density: float | None
    document: Path | None
    repetitions: int
    device: str
    dtype: torch.dtype


@dataclass
class Row:
    """One sequence over so many ranks; times are those of the slowest rank.

    Attributes:
        subject: `OPERATOR`, or a model.
        length: Positions of the sequence.
        ranks: Processes, each with a GPU of its own.
        layout: Which positions a rank holds, or `HEADS`; empty for one rank.
        seconds: Of a call of the operator, or of a prefill to its last token's logits, the median.
        spread: Range of the repetitions over their median.
        speedup: Time of one rank over its own.
        attention: Seconds of the operator on keys and values that are there already.
        exposed: Seconds of a call beyond these.
        gather: Seconds to gather keys and values and put them in order, alone; of a prefill, of NCCL's kernels, with
            what they wait for other ranks.
        hidden: Of these, seconds that a call does not show.
        balance: `attention` of the slowest rank over the mean of the ranks.
        visited: Visited pairs of the rank with the most over the mean of the ranks.
        received: GiB that a rank receives for one call of attention.
        mebibytes: Memory at its peak beside inputs and weights, of the rank with the most; None on a CPU.
        difference: Relative squared difference to one rank, of the output or of the last token's logits.
        density: Visited pairs over those of dense attention; None for prefills.
        setting: The diffuseness of the operator's queries, or the threshold of a prefill.
        reason: Why it could not run; empty where it did.
    """

    subject: str
    length: int
    ranks: int
    layout: str
    seconds: float | None = None
    spread: float | None = None
    speedup: float | None = None
    attention: float | None = None
    exposed: float | None = None
    gather: float | None = None
    hidden: float | None = None
    balance: float | None = None
    visited: float | None = None
    received: float | None = None
    mebibytes: float | None = None
    difference: float | None = None
    density: float | None = None
    setting: float | None = None
    reason: str = ""
