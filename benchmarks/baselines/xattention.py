"""XAttention (arXiv 2503.16428): blocks scored by sums over their antidiagonals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, causal, cover, cut, last_attention, strips
from .visit import Visit

THRESHOLD = 0.9
"""As published, with a stride of 8 or 16."""


def xattention(
    query: torch.Tensor, key: torch.Tensor, scale: float, thresholds: Sequence[float], stride: int = 8
) -> Iterator[Visit]:
    """Visit the blocks that cover a share of each block row's score, the first and the diagonal block included.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        thresholds: Shares to cover.
        stride: Neighbouring positions whose products are summed along the antidiagonal; divides 128.
    """
    folded_query = cut(cut(query, BLOCK).flatten(0, 1), stride).flip(1).flatten(1)
    folded_key = cut(cut(key, BLOCK).flatten(0, 1), stride).flatten(1)
    scores = block_scores(folded_query, folded_key, scale / stride, BLOCK // stride)
    allowed = causal(len(scores), key.device)
    forced = torch.eye(len(scores), dtype=torch.bool, device=key.device)
    forced[:, 0] = True
    ranking = len(key) ** 2 / stride * key.shape[1]
    for threshold in thresholds:
        yield Visit(cover(scores, threshold, forced) & allowed, BLOCK, BLOCK, ranking)


def block_scores(query: torch.Tensor, key: torch.Tensor, scale: float, size: int) -> torch.Tensor:
    """Causal attention among folded positions, summed over blocks of `size` of them: [blocks, blocks]."""
    blocks = len(key) // size
    scores = key.new_zeros(blocks, blocks)
    for strip in strips(len(key), size):
        attention = last_attention(query[: strip.stop], key[: strip.stop], scale, len(strip))
        summed = attention.unflatten(1, (-1, size)).sum(2).unflatten(0, (-1, size)).sum(1)
        scores[strip.start // size : strip.stop // size, : strip.stop // size] = summed
    return scores
