"""The whole history sorted by importance, in torch operations: the order in which the "gain" rule visits keys."""

from __future__ import annotations

import math

import torch

from .config import S2OConfig
from .geometry import Geometry


def sorted_history(
    guides: torch.Tensor,
    key: torch.Tensor,
    key_padding: torch.Tensor | None,
    segments: range,
    geometry: Geometry,
    scale: float,
    config: S2OConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the history of each segment by its importance, one list per head.

    Args:
        guides: [B, Hkv, G, n, D], of the segments alone.
        key: [B, Hkv, Lk, D].
        key_padding: [B, Lk] boolean or None.
        segments: Which segments.
        geometry: Places the spans.
        scale: Factor of the logits.
        config: The rule.

    Returns:
        Keys to visit [B, Hkv, G, segments, Lk] int32, and how many of them count [B, Hkv, G, segments] int32.
    """
    per_segment = config.segment // config.pool
    padding = len(segments) * per_segment - guides.shape[3]
    starts = torch.arange(guides.shape[3], device=key.device) * config.pool + segments.start * config.segment
    spans = torch.tensor([geometry.span(s) for s in segments], device=key.device)
    positions = torch.arange(geometry.keys, device=key.device)
    of_guide = spans.repeat_interleave(per_segment, 0)[: guides.shape[3]]
    history = _history(positions, spans, geometry)
    exact = (positions >= of_guide[:, :1]) & (positions < of_guide[:, 1:])
    if geometry.is_causal:
        exact = exact & (positions <= starts[:, None] + geometry.offset)
    drawn = positions % config.sample == config.sample // 2
    far = _history(positions, of_guide, geometry)
    weight = exact + far * torch.where(positions < config.first_keys, 1, config.sample * drawn)
    logits = (guides.float() @ key.float()[:, :, None].transpose(-1, -2)) * scale
    if key_padding is not None:
        weight = weight * key_padding[:, None, None, None]
        history = history & key_padding[:, None, None, None]
    lse = (logits + weight.log()).masked_fill(weight == 0, -math.inf).logsumexp(-1, keepdim=True)
    share = torch.nn.functional.pad((logits - lse).exp(), (0, 0, 0, padding)).unflatten(3, (len(segments), -1))
    counts = torch.full((len(segments),), per_segment, device=key.device)
    counts[-1] -= padding
    importance = torch.maximum(share.amax(4) * config.max_weight, share.sum(4) * (config.mean_weight / counts)[:, None])
    importance = importance.masked_fill(importance.isnan() | (positions < config.first_keys), math.inf)
    order = importance.masked_fill(~history, -1).argsort(dim=-1, descending=True, stable=True)
    return order.int(), history.sum(-1).expand(importance.shape[:-1]).int()


def _history(positions: torch.Tensor, spans: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    history = positions < spans[:, :1]
    return history if geometry.is_causal else history | (positions >= spans[:, 1:])
