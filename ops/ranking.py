"""The whole history sorted by importance, in torch operations: the order in which the "gain" rule visits keys."""

from __future__ import annotations

import math

import torch

from .config import S2OConfig
from .geometry import Geometry
from .softmax import soft_cap
from .visibility import Visibility


def sorted_history(
    guides: torch.Tensor,
    key: torch.Tensor,
    visibility: Visibility,
    segments: range,
    geometry: Geometry,
    scale: float,
    softcap: float,
    config: S2OConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the history of each segment by its importance, one list per head.

    Args:
        guides: [B, Hkv, G, n, D], of the segments alone.
        key: [B, Hkv, Lk, D].
        visibility: Which keys each query sees; a guide sees what its first query sees.
        segments: Which segments.
        geometry: Places the spans.
        scale: Factor of the logits.
        softcap: Bound of the logits, 0 for none.
        config: The rule.

    Returns:
        Keys to visit [B, Hkv, G, segments, Lk] int32, and how many of them count [B, Hkv, G, segments] int32.
    """
    per_segment = config.ranking.segment // config.ranking.pool
    batch, groups, group, count, _ = guides.shape
    padding = len(segments) * per_segment - count
    device = key.device
    positions = torch.arange(geometry.keys, device=device)
    seen = visibility.seen(
        torch.arange(batch, device=device)[:, None, None, None, None],
        torch.arange(groups * group, device=device).view(groups, group, 1, 1),
        torch.arange(count, device=device)[:, None] * config.ranking.pool + segments.start * config.ranking.segment,
        positions,
    ).expand(batch, groups, group, count, geometry.keys)
    spans = geometry.spans(segments, device)
    of_guide = spans.repeat_interleave(per_segment, 0)[:count]
    dense = (positions >= of_guide[:, 1:2]) & (positions < of_guide[:, 2:])
    drawn = positions % config.ranking.sample == config.ranking.sample // 2
    far = geometry.history(positions, of_guide)
    weight = (dense + far * torch.where(positions < config.ranking.first_keys, 1, config.ranking.sample * drawn)) * seen
    logits = soft_cap((guides.float() @ key.float()[:, :, None].transpose(-1, -2)) * scale, softcap)
    lse = (logits + weight.log()).masked_fill(weight == 0, -math.inf).logsumexp(-1, keepdim=True)

    def by_segment(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, padding)).unflatten(3, (len(segments), -1))

    share = by_segment((logits - lse).exp().masked_fill(~seen, 0))
    history = geometry.history(positions, spans) & by_segment(seen).any(4)
    guides_of = torch.full((len(segments),), per_segment, device=device)
    guides_of[-1] -= padding
    importance = share.amax(4) if config.ranking.combine == "max" else share.sum(4) * (1 / guides_of)[:, None]
    importance = importance.masked_fill(importance.isnan() | (positions < config.ranking.first_keys), math.inf)
    order = importance.masked_fill(~history, -1).argsort(dim=-1, descending=True, stable=True)
    return order.int(), history.sum(-1).int()
