"""Blocks by the products of their mean queries and mean keys, as block-sparse attention is often done."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, cover, pool, probability
from .visit import Visit


def pooled_blocks(query: torch.Tensor, key: torch.Tensor, scale: float, thresholds: Sequence[float]) -> Iterator[Visit]:
    """Visit the blocks that cover a share of each block row's softmax, the first and the diagonal block always.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        thresholds: Shares to cover.
    """
    yield from select_blocks(query, key, scale, thresholds, torch.arange(len(key), device=key.device), BLOCK)


def select_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
    thresholds: Sequence[float],
    order: torch.Tensor,
    segment: int,
) -> Iterator[Visit]:
    """The same over blocks of keys in the `order` [L], that stay in their segment of `segment` positions.

    The blocks of a query's own segment and the one with the first key are always visited.
    """
    mean_query, mean_key = pool(query), pool(key[order])
    segments = torch.arange(len(mean_key), device=key.device) * BLOCK // segment
    own, earlier = segments == segments[:, None], segments < segments[:, None]
    scores = probability(mean_query, mean_key, scale, earlier)
    forced = own.clone()
    first = (order == 0).nonzero()[0, 0] // BLOCK
    forced[:, first] |= earlier[:, first]
    ranking = len(mean_key) * mean_key.numel()
    for threshold in thresholds:
        yield Visit(cover(scores, threshold, forced), BLOCK, BLOCK, ranking, order)
