"""PBS-Attn (arXiv 2510.21270): keys are permuted within segments, so that fewer blocks hold the important ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, cut, last_attention
from .pooled_blocks import select_blocks
from .visit import Visit

THRESHOLD = 0.9
SEGMENT = 256
"""Both as published."""


def pbs(
    query: torch.Tensor, key: torch.Tensor, scale: float, thresholds: Sequence[float], segment: int = SEGMENT
) -> Iterator[Visit]:
    """Sort each segment's keys by the last block of queries' attention; visit blocks by their means.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        thresholds: Shares of each block row's softmax to cover.
        segment: Positions of a segment, a multiple of 128. A query's own segment is always visited.
    """
    weight = cut(last_attention(query, key, scale, BLOCK).mean(0), segment)
    starts = torch.arange(0, len(key), segment, device=key.device)
    order = (weight.argsort(dim=-1, descending=True, stable=True) + starts[:, None]).flatten()
    sorting = 2 * BLOCK * key.numel()
    for visit in select_blocks(query, key, scale, thresholds, order[order < len(key)], segment):
        yield dataclasses.replace(visit, ranking=visit.ranking + sorting)
