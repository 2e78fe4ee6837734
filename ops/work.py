"""The work of a call of attention, from its shapes and the terms of its mask alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .sizes import bounds
from .visibility import Visibility

Size = int | torch.SymInt


_EXACT = frozenset({int, type(None)})


class Work(NamedTuple):
    """How much dense attention has to do.

    `multiply_adds` is batch x query heads x visible pairs x (D + Dv), and `keys` the keys that a query sees, the mean
    over the queries. Padding, documents and masks, whose contents the host does not know, hide nothing: the ranking
    scores what they hide too, and SDPA computes it.
    """

    multiply_adds: float
    keys: float


def work_of(query: Sequence[Size], key: Sequence[Size], value: Sequence[Size], terms: Visibility) -> tuple[Work, Work]:
    """The least and the most work of calls of these shapes [B, H, L, D]; both the same where no size is symbolic."""
    batch, heads, queries, width = query
    sizes: Any = (batch, heads, queries, key[2], width + value[3])
    first: Any = None if terms.window is None else terms.causal_offset - terms.window
    last: Any = terms.causal_offset if terms.is_causal else None
    if _EXACT.issuperset(map(type, (*sizes, first, last))):
        exact = _work(sizes, first, last)
        return exact, exact
    low, high = zip(*map(bounds, sizes), strict=True)
    (first_from, first_to), (last_from, last_to) = (
        (None, None) if limit is None else bounds(limit) for limit in (first, last)
    )
    least, most = _work(low, first_to, last_from), _work(high, first_from, last_to)
    if terms.window is None:  # Later queries see as many keys or more, so that the means are bounds too.
        return least, most
    fewest = least.keys * low[2] / max(1, high[2])
    widest = high[3] if last is None else min(high[3], bounds(terms.window)[1])  # Without a last key, it has no end.
    return least._replace(keys=fewest), most._replace(keys=float(widest))


def visible_pairs(queries: int, keys: int, first: int | None, last: int | None) -> int:
    """The pairs of a query i and a key j with first < j - i <= last; None limits nothing."""
    up_to_last = queries * keys if last is None else _sum_of_clipped(last + 1, queries, keys)
    return up_to_last if first is None else max(0, up_to_last - _sum_of_clipped(first + 1, queries, keys))


def _work(sizes: Sequence[int], first: int | None, last: int | None) -> Work:
    """Of batch, query heads, queries, keys and channels, those of key and value together."""
    batch, heads, queries, keys, channels = sizes
    pairs = visible_pairs(queries, keys, first, last)
    return Work(float(batch * heads * pairs * channels), pairs / max(1, queries))


def _sum_of_clipped(first: int, count: int, most: int) -> int:
    """The sum of max(0, min(i, most)) for `count` numbers i from `first` on."""
    return _sum_below(first + count, most) - _sum_below(first, most)


def _sum_below(end: int, most: int) -> int:
    """The sum of min(i, most) for i from 0 to below `end`."""
    rising = max(0, min(end, most))
    return rising * (rising - 1) // 2 + max(0, end - most) * most
