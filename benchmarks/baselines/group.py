"""The query heads of one KV head, for rules that choose for them together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .visit import Visit


@dataclass(frozen=True)
class Group:
    """What the query heads of one KV head attend, causally.

    Attributes:
        query: [G, L, D].
        key: [L, D].
        value: [L, Dv].
        scale: Factor of the logits.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float


Rule = Callable[[torch.Tensor, torch.Tensor, float, Sequence[float]], Iterator[Visit]]
"""The rule of one query head."""
GroupRule = Callable[[Group, Sequence[float]], Iterator[list[Visit]]]
"""The rule of the query heads of a KV head."""


def by_head(rule: Rule) -> GroupRule:
    """A rule of single query heads as one of all that share a KV head."""

    def visits(group: Group, settings: Sequence[float]) -> Iterator[list[Visit]]:
        heads = (rule(query, group.key, group.scale, settings) for query in group.query)
        yield from map(list, zip(*heads, strict=True))

    return visits
