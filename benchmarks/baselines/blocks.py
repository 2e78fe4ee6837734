"""What rules over square blocks share: pooling, the causal mask of blocks, and covering a share of the scores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import pad

BLOCK = 128
"""Positions of a block, of queries and of keys, as all block rules publish it."""
PAIRS_AT_ONCE = 2**26
"""Pairs of a query and a key whose attention is held at once."""


def cut(x: torch.Tensor, size: int) -> torch.Tensor:
    """Cut the first dimension into blocks [blocks, size, ...], the last filled up with zeros."""
    return pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % size)).unflatten(0, (-1, size))


def pool(x: torch.Tensor, size: int = BLOCK) -> torch.Tensor:
    """Mean over each block of positions: [L, D] to [blocks, D]."""
    count = cut(x.new_ones(len(x), 1), size).sum(1)
    return cut(x, size).sum(1) / count


def causal(blocks: int, device: torch.device) -> torch.Tensor:
    """Which blocks of keys start no later than a block of queries [blocks, blocks]."""
    return torch.ones(blocks, blocks, dtype=torch.bool, device=device).tril()


def strips(length: int, rows: int) -> Iterator[range]:
    """Consecutive positions, multiples of `rows` but for the last, whose attention to all `length` is small enough."""
    size = max(1, PAIRS_AT_ONCE // (rows * length)) * rows
    return (range(first, min(first + size, length)) for first in range(0, length, size))


def probability(query: torch.Tensor, key: torch.Tensor, scale: float, allowed: torch.Tensor) -> torch.Tensor:
    """Softmax over the allowed keys [R, N]; zeros in rows that are allowed none."""
    logits = (query @ key.T * scale).masked_fill(~allowed, -math.inf)
    return logits.softmax(-1).masked_fill(~allowed, 0)


def last_attention(query: torch.Tensor, key: torch.Tensor, scale: float, rows: int) -> torch.Tensor:
    """The causal attention of the last `rows` queries [L, D], or of all where they are fewer: [rows, L]."""
    last = query[-rows:]
    logits = (last * scale) @ key.T
    late = torch.ones(len(last), len(last), dtype=torch.bool, device=key.device).triu(1)
    logits[:, -len(last) :].masked_fill_(late, -math.inf)
    return logits.softmax(-1)


def cover(scores: torch.Tensor, share: float, forced: torch.Tensor) -> torch.Tensor:
    """The fewest blocks of each row that hold `share` of its scores, with those that are `forced` anyway.

    Args:
        scores: [blocks, blocks], at least 0.
        share: From 0 to 1.
        forced: [blocks, blocks] boolean; their scores count first.
    """
    ordered, index = scores.masked_fill(forced, 0).sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered + (scores * forced).sum(-1, keepdim=True)
    wanted = (before < share * scores.sum(-1, keepdim=True)) & (ordered > 0)
    return torch.zeros_like(forced).scatter(-1, index, wanted) | forced


def sinks_and_window(blocks: int, sinks: int, window: int, device: torch.device) -> torch.Tensor:
    """The first blocks, and those within the window of each block of queries, causally [blocks, blocks]."""
    allowed = causal(blocks, device)
    index = torch.arange(blocks, device=device)
    return allowed & ((index < sinks) | (index > index[:, None] - window))
