"""Prism (arXiv 2602.08426, github.com/xinghaow99/prism): block means in two bands of rotary frequencies.

Averaging over a block cancels the fast channels, so the fast and the slow channels score apart, each at a temperature
that gives back the energy that its means have lost. Channels are taken as halves that rotate together, the fastest
first. Nothing is published as a crutch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .blocks import BLOCK, causal, cover, pool, probability
from .visit import Visit

THRESHOLD = 0.95
SLOW, FAST = 0.75, 0.5
"""Shares of the softmax to cover and of the channels in each band, as published (96 and 64 of 128 channels)."""


def prism(query: torch.Tensor, key: torch.Tensor, scale: float, thresholds: Sequence[float]) -> Iterator[Visit]:
    """Visit the blocks that cover a share of either band's softmax, the first and the diagonal block always.

    Args:
        query: [L, D].
        key: [L, D].
        scale: Factor of the logits.
        thresholds: Shares to cover.
    """
    mean_query, mean_key = pool(query), pool(key)
    allowed = causal(len(mean_key), key.device)
    none = torch.zeros_like(allowed)
    forced = torch.eye(len(mean_key), dtype=torch.bool, device=key.device)
    forced[:, 0] = True
    bands = [band(key.shape[1], share, is_fast) for share, is_fast in ((SLOW, False), (FAST, True))]
    scores = [
        probability(mean_query[:, some], mean_key[:, some], scale / lost_energy(mean_query, mean_key, some), allowed)
        for some in bands
    ]
    ranking = len(mean_key) ** 2 * sum(map(len, bands))
    for threshold in thresholds:
        chosen = torch.stack([cover(score, threshold, none) for score in scores]).any(0)
        yield Visit(chosen | forced, BLOCK, BLOCK, ranking)


def band(channels: int, share: float, is_fast: bool) -> list[int]:
    """The channels of a band: as many of both halves, from the start if it is the fast one, else up to the end."""
    half = channels // 2
    count = round(share * half)
    some = range(count) if is_fast else range(half - count, half)
    return [*some, *(half + index for index in some)]


def lost_energy(query: torch.Tensor, key: torch.Tensor, some: list[int]) -> float:
    """The temperature of a band times the root of its share of the channels, so that it divides the plain scale."""
    share = len(some) / query.shape[1]
    energy = [float(x[:, some].square().mean().sqrt() / x.square().mean().sqrt().clamp_min(1e-6)) for x in (query, key)]
    return max(1e-6, share * energy[0] * energy[1])
