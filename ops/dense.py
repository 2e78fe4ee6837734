"""Dense attention with the operator's masks: what short calls run, through the best backend of SDPA."""

from __future__ import annotations

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn.functional import scaled_dot_product_attention


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    key_padding: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """SDPA; shapes as in `ops.operator`. Rows with nothing to attend to give zeros."""
    grouped = query.shape[1] != key.shape[1]
    if is_causal and statically_known_true(causal_offset >= key.shape[2] - 1):
        is_causal = False
    if key_padding is None and (not is_causal or statically_known_true(causal_offset == 0)):
        return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    mask = torch.ones((), dtype=torch.bool, device=key.device) if key_padding is None else key_padding[:, None, None, :]
    if is_causal:
        columns = torch.arange(key.shape[2], device=key.device)
        rows = torch.arange(query.shape[2], device=key.device) + causal_offset
        mask = mask & (columns <= rows[:, None])
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.masked_fill(~mask.any(-1, keepdim=True), 0)
