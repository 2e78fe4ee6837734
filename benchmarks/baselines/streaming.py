"""StreamingLLM's pattern (arXiv 2309.17453): the first keys, which are attention sinks, and a window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .lines import slash_keys
from .visit import Visit

TILE = 64
SINKS = 4
WINDOW = 1020
"""As published: 4 sinks and, of a cache of 1,024 keys, the rest."""


def streaming(query: torch.Tensor, key: torch.Tensor, scale: float, windows: Sequence[float]) -> Iterator[Visit]:
    """Visit the first four keys and those within the window of any of a tile's queries.

    Args:
        query: [L, D], not looked at.
        key: [L, D], not looked at.
        scale: Not looked at.
        windows: Keys up to and with a query's own.
    """
    positions = torch.arange(len(key), device=key.device)
    starts = torch.arange(0, len(key), TILE, device=key.device)[:, None]
    sinks = (positions < SINKS) & (positions < starts + TILE)
    for window in windows:
        yield Visit(slash_keys(positions < window, TILE) | sinks, TILE, 1, ranking=0)
