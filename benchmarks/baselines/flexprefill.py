"""FlexPrefill (arXiv 2502.20766): each head's pattern and its size follow from the attention of the last queries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, causal, cut, last_attention, pool, probability
from .lines import largest, slash_sums
from .visit import Visit

COVERAGE = 0.9
DIVERGENCE = 0.1
LEAST_KEYS = 1024
"""gamma, tau and the least budget of a head, as published."""


def flexprefill(query: torch.Tensor, key: torch.Tensor, scale: float, coverages: Sequence[float]) -> Iterator[Visit]:
    """Visit vertical and slash lines of blocks, and where block means predict a head's attention, blocks by them.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        coverages: Shares of the attention to cover (gamma).
    """
    attention = last_attention(query, key, scale, BLOCK)
    vertical, slash = attention.mean(0), slash_sums(attention) / len(attention)
    mean_query, mean_key = pool(query), pool(key)
    allowed = causal(len(mean_key), key.device)
    ranking = 2 * len(attention) * key.numel() + 2 * mean_key.numel()
    predicted = probability(query[-BLOCK:].mean(0, keepdim=True), mean_key, scale, allowed[-1:])[0]
    by_means = bool(divergence(predicted, cut(vertical, BLOCK).sum(1)) < DIVERGENCE)
    scores = probability(mean_query, mean_key, scale, allowed) if by_means else None
    ranking += by_means * len(mean_key) * mean_key.numel()
    for coverage in coverages:
        sizes = [0, 0] if by_means else [covering(line, coverage) for line in (vertical, slash)]
        mask = _lines(vertical, slash, *(max(size // BLOCK + 1, LEAST_KEYS // BLOCK) for size in sizes)) & allowed
        if scores is not None:
            mask |= _covering_blocks(scores, coverage)
        yield Visit(mask, BLOCK, BLOCK, ranking)


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The square root of the Jensen-Shannon divergence, in nats, of two distributions [N]."""
    middle = (p + q) / 2
    return torch.stack([torch.xlogy(x, x / middle).nansum() for x in (p, q)]).mean().sqrt()


def covering(scores: torch.Tensor, share: float) -> int:
    """How many of the scores [N], that sum to 1, cover a share, largest first."""
    return int((scores.sort(descending=True).values.cumsum(0) <= share).sum()) + 1


def _lines(vertical: torch.Tensor, slash: torch.Tensor, verticals: int, slashes: int) -> torch.Tensor:
    """The largest lines of blocks [blocks, blocks], from scores of keys and of distances [L]; the first ones always."""
    by_key, by_distance = cut(vertical, BLOCK).sum(1), cut(slash, BLOCK).sum(1)
    by_key[0] = by_distance[0] = torch.inf
    index = torch.arange(len(by_key), device=by_key.device)
    distance = (index[:, None] - index).clamp_min(0)
    return largest(by_key, verticals) | largest(by_distance, slashes)[distance]


def _covering_blocks(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The blocks that cover a share of all rows' softmax together [blocks, blocks]."""
    ordered, index = scores.flatten().sort(descending=True)
    chosen = torch.zeros_like(ordered, dtype=torch.bool)
    chosen[index[ordered.cumsum(0) <= share * len(scores)]] = True
    return chosen.view_as(scores)
