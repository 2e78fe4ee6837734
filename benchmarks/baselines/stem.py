"""Stem (arXiv 2603.06274), as published in github.com/Tencent/AngelSlim: blocks by strided products and by values.

A block's score is its mean antidiagonal product, as in XAttention but without a softmax, and a bonus for large values.
A row of blocks visits a fixed number of them. The paper lets that number fall with the position; the published default
does not (its `alpha` is 1), nor does this module, as what the paper used for a model could not be read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, cut, sinks_and_window
from .group import Group
from .visit import Visit

KEPT = 0.2
"""Share of all blocks that a row visits, as published."""
STRIDE = 8
BONUS = 0.2
SINKS, WINDOW = 4, 4
"""The stride, the weight of values, and the first and latest blocks that are always visited, as published."""
FIRST_LAYERS = 2
"""Layers that attend densely, as published: a crutch."""
ALL_BELOW, MOST_BELOW = 56, 160
"""Texts of fewer blocks keep every block, or 30 more than a fifth of them, as published: a crutch; longer ones keep 30
more than a tenth."""


def stem(group: Group, kept: Sequence[float], relaxed: bool = False) -> Iterator[list[Visit]]:
    """Visit as many of the best blocks in every row, the first and the latest ones.

    Args:
        group: The query heads of a KV head.
        kept: Shares of all blocks.
        relaxed: Whether short texts keep more, as published, whatever the share.
    """
    bonus = value_bonus(group.value)
    scores = [block_scores(query, group.key, group.scale) + bonus for query in group.query]
    blocks = len(bonus)
    forced = sinks_and_window(blocks, SINKS, WINDOW, group.key.device)
    allowed = torch.ones_like(forced).tril()
    ranking = len(group.key) ** 2 / STRIDE * group.key.shape[1]
    for share in kept:
        count = budget(blocks, share, relaxed)
        yield [Visit(best(score, count, allowed) | forced, BLOCK, BLOCK, ranking) for score in scores]


def budget(blocks: int, share: float, relaxed: bool) -> int:
    """How many of all blocks a row visits."""
    count = int(share * blocks)
    if not relaxed or count == blocks:
        return count
    if blocks < ALL_BELOW:
        return blocks
    return int(blocks * (0.2 if blocks < MOST_BELOW else 0.1)) + 30


def block_scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Mean products [blocks, blocks] of positions whose offsets in their strides add up to the stride less one."""
    folded_query, folded_key = (cut(cut(x, BLOCK).flatten(0, 1), STRIDE) for x in (query, key))
    mean_query, mean_key = (x.unflatten(0, (-1, BLOCK // STRIDE)).mean(1) for x in (folded_query.flip(1), folded_key))
    return mean_query.flatten(1) @ mean_key.flatten(1).T * (scale / STRIDE)


def value_bonus(value: torch.Tensor) -> torch.Tensor:
    """What large values [L, Dv] add to the scores of their blocks: [blocks]."""
    size = cut(value.norm(dim=-1), STRIDE).amax(1).add(1e-6).log()
    above = ((size - size.mean()) / (size.std() + 1e-6)).relu()
    return BONUS * cut(above, BLOCK // STRIDE).mean(1)


def best(scores: torch.Tensor, count: int, allowed: torch.Tensor) -> torch.Tensor:
    """The `count` allowed blocks of each row with the largest scores [blocks, blocks]."""
    index = scores.masked_fill(~allowed, -torch.inf).topk(count, dim=-1).indices
    return torch.zeros_like(allowed).scatter(-1, index, True) & allowed
