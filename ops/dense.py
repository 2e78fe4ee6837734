"""Dense attention with the operator's masks: what short calls run, through the best backend of SDPA."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import scaled_dot_product_attention

from .visibility import Visibility


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Visibility, scale: float | None
) -> torch.Tensor:
    """SDPA; shapes as in `ops.operator`. Rows with nothing to attend to give zeros."""
    grouped = query.shape[1] != key.shape[1]
    is_causal = visibility.is_causal
    if visibility._replace(is_causal=False).is_empty and (
        not is_causal or statically_known_true(visibility.causal_offset == 0)
    ):
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    mask = _mask(visibility, query, key)
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.masked_fill(~mask.any(-1, keepdim=True), 0)


def _mask(visibility: Visibility, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """All terms as one boolean that broadcasts to [B, Hq, Lq, Lk]."""
    terms, mask = visibility._replace(mask=None), visibility.mask
    if terms.is_empty and mask is not None:
        return mask
    batch, row, column = (
        torch.arange(size, device=key.device) for size in (query.shape[0], query.shape[2], key.shape[2])
    )
    seen = terms.seen(batch[:, None, None, None], 0, row[:, None], column)
    return seen if mask is None else seen & mask
