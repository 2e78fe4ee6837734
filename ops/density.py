"""How much of dense attention's work a call did, counted as kernels count it, padding of blocks included."""

from __future__ import annotations

import functools

import torch

from .config import S2OConfig
from .geometry import Geometry, round_up
from .rule.channels import key_covariance, project
from .rule.guides import pool_guides
from .rule.merging import MERGED, find_clusters


@functools.cache
def dense_pairs(
    queries: int, keys: int, is_causal: bool, causal_offset: int, tile: int, window: int | None = None
) -> int:
    """The (query, key) pairs that a dense kernel visits for one head, in tiles and blocks of keys.

    Such a kernel skips what the causal mask or the window hides from a whole tile, and nothing for other terms.
    """
    dense = Geometry(
        queries, keys, is_causal, causal_offset, window, segment=tile, tile=tile, near_keys=0, last_queries=queries
    )
    total = 0
    for index in range(dense.tiles):
        _, low, high = dense.span(index)
        total += min(tile, queries - index * tile) * round_up(high - low)
    return total


def density(
    visited: torch.Tensor,
    queries: int,
    keys: int,
    is_causal: bool,
    causal_offset: int,
    tile: int,
    window: int | None = None,
) -> torch.Tensor:
    """Visited pairs [B, Hq, tiles] over the pairs that a dense kernel visits, per batch and head: [B, Hq]."""
    return visited.sum(-1) / max(1, dense_pairs(queries, keys, is_causal, causal_offset, tile, window))


def ranking_share(config: S2OConfig, channels: int, value_channels: int, group_size: int) -> float:
    """The ratio of ranking FLOPs to dense attention's FLOPs, visited pairs not counted, if no queries are merged.

    Each guide is multiplied with every key, and with one in `Ranking.sample` once more for its log-sum-exp.

    Args:
        config: The rule.
        channels: D.
        value_channels: Dv.
        group_size: Query heads per KV head.
    """
    queries_a_guide = config.ranking.pool * (group_size if config.ranking.guides == "kv_head" else 1)
    return scored_channels(config, channels) / (queries_a_guide * (channels + value_channels))


def scored_channels(config: S2OConfig, channels: int) -> float:
    """The multiplications of a guide and a key, of D channels: its score, and its part in a log-sum-exp."""
    return min(config.ranking.channels or channels, channels) + channels / config.ranking.sample


def share_in_all_channels(query: torch.Tensor, key: torch.Tensor, scale: float, config: S2OConfig) -> float:
    """The share of KV heads whose keys are scored in all channels, as fewer neglect too much (`rule.channels`).

    Args:
        query: [..., Hq, Lq, D].
        key: [..., Hkv, Lk, D].
        scale: Factor of the logits.
        config: Gives the guides and how many channels they are.
    """
    guides = pool_guides(query.unflatten(-3, (key.shape[-3], -1)), config)
    return float(project(guides, key, config.ranking.channels, scale).neglects_too_much.double().mean())


def share_of_guides(query: torch.Tensor, key: torch.Tensor, scale: float, config: S2OConfig) -> float:
    """The guides that are left where queries are merged (`rule.merging`), over those that there would be; else 1.

    Args:
        query: [B, Hq, Lq, D], of a call without padding that lets its queries be merged.
        key: [B, Hkv, Lk, D].
        scale: Factor of the logits.
        config: Gives the radius, the segments, and the keys from which on queries are merged.
    """
    ranking, length = config.ranking, query.shape[2]
    if not ranking.merges or key.shape[2] < ranking.merge_length:
        return 1.0
    run = min(MERGED, ranking.segment)
    real = torch.arange(length + -length % run, device=query.device).view(-1, run) < length
    guides = 0
    for queries, keys in zip(query, key, strict=True):
        covariance = key_covariance(keys, None).float()
        for rows, of_keys in zip(queries.unflatten(0, (len(keys), -1)), covariance, strict=True):
            runs = torch.nn.functional.pad(rows.float() * scale, (0, 0, 0, -length % run)).unflatten(1, (-1, run))
            guides += int(find_clusters(runs, real, of_keys, ranking.radius).number.sum())
    return guides / (query.shape[0] * query.shape[1] * length)
