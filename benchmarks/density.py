"""The density of the operator on a sample of the queries, and the search for what gives a wanted one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from s2o_compile._attention import attention
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.density import dense_pairs

STRETCHES = 8
STRETCH = 256
STEPS = 12
TOLERANCE = 0.02
"""Relative distance from the wanted density at which a search ends."""


def check_density(density: float) -> None:
    """Check what `--density` says.

    Raises:
        UsageError: It is no share.
    """
    if not 0 < density < 1:
        raise UsageError(f"--density must be between 0 and 1, not {density}.")


def sampled_density(
    query_of: Callable[[slice], torch.Tensor],
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    config: S2OConfig,
    scale: float | None = None,
) -> float:
    """The density over `STRETCHES` stretches of queries, evenly spread; or over all queries, if there are no more.

    Args:
        query_of: Gives the queries [B, Hq, rows, D] of some rows.
        key: [B, Hkv, L, D], as many as there are queries.
        value: [B, Hkv, L, Dv].
        is_causal: Whether query i sees only the keys up to i.
        config: The settings; the last queries are taken for others, `min_length` for 0.
        scale: Factor of the logits, by default D ** -0.5.
    """
    config = dataclasses.replace(config, last_queries=0, min_length=0)
    length, rows = key.shape[2], max(STRETCH, config.ranking.segment)
    count = min(STRETCHES, -(-length // rows))
    visited = pairs = 0
    for place in range(count):
        start = (2 * place + 1) * length // (2 * count) // rows * rows
        end = min(start + rows, length)
        keys = end if is_causal else length
        query = query_of(slice(start, end))
        result = attention(
            query,
            key[:, :, :keys],
            value[:, :, :keys],
            is_causal,
            causal_offset=start,
            scale=scale,
            config=config,
            return_stats=True,
        )
        visited += int(result.visited.sum())
        pairs += query.shape[0] * query.shape[1] * dense_pairs(end - start, keys, is_causal, start, config.ranking.tile)
    return visited / pairs


def find(density_at: Callable[[float], float], wanted: float, low: float, high: float) -> float:
    """Where a density that grows from `low` to `high` is the wanted one, by bisection; an end, if it is nowhere."""
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = density_at(middle)
        if abs(found / wanted - 1) < TOLERANCE:
            break
        low, high = (middle, high) if found < wanted else (low, middle)
    return middle
