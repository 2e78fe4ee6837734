"""The result of attention."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class AttentionResult(NamedTuple):
    """The result of attention: output, log-sum-exp, and visited work."""

    output: torch.Tensor
    """[B, Hq, Lq, Dv], in the dtype of the query; zeros for rows with nothing to attend to."""
    lse: torch.Tensor
    """[B, Hq, Lq], the natural log of the softmax denominator over what was visited; -inf for empty rows."""
    visited: torch.Tensor
    """[B, Hq, tiles] int64, (query, key) pairs visited, keys counted in blocks of 64."""

    @classmethod
    def empty(cls, query: torch.Tensor, value: torch.Tensor, tile: int) -> AttentionResult:
        """Uninitialised results for a call; the output is stored as [B, Lq, Hq, Dv]."""
        batch, heads, length, _ = query.shape
        return cls(
            query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2),
            query.new_empty(batch, heads, length, dtype=torch.float32),
            query.new_empty(batch, heads, -(-length // tile), dtype=torch.int64),
        )

    @classmethod
    def of_nothing(cls, query: torch.Tensor, value: torch.Tensor, tile: int) -> AttentionResult:
        """The results of a call without keys, or without queries."""
        output, lse, visited = cls.empty(query, value, tile)
        return cls(output.zero_(), lse.fill_(-math.inf), visited.zero_())
