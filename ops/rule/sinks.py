"""Attention sinks: a learned logit per head that enters only the denominator of the softmax (gpt-oss).

A sink scales a row that was attended without it: output * exp(lse - lse'), with lse' = logaddexp(lse, sink). Keys are
ranked without it, which keeps more of them than the row's true mass would.
"""

from __future__ import annotations

import math

import torch

from ..result import AttentionResult


def add_sinks(result: AttentionResult, sinks: torch.Tensor) -> AttentionResult:
    """The result with `sinks` [Hq]: a row that sees nothing stays zero, and its lse is the sink."""
    lse = torch.logaddexp(result.lse, sinks.to(result.lse.dtype)[:, None])
    share = (result.lse - lse.masked_fill(lse == -math.inf, 0)).exp()
    return AttentionResult((result.output * share[..., None]).to(result.output.dtype), lse, result.visited)
