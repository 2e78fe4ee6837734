"""Dense attention of gathered tiles, with log-sum-exp.

The fused kernel behind ``scaled_dot_product_attention`` on a CPU returns the log-sum-exp that partial results are
merged by, but has no public name. This module alone calls it; other devices run plain torch operations.
"""

from __future__ import annotations

import math

import torch

from ..rule.softmax import soft_cap

_fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    softcap: float,
    finite: bool,
    limit: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with scale 1 and an additive bias of 0 or more, or -inf for keys that a row does not see.

    Args:
        query: [U, H, R, D], of a floating dtype.
        key: [U, N, D].
        value: [U, N, Dv].
        bias: [U, H or 1, R or 1, N].
        softcap: Bound of the logits before the bias, 0 for none; other values cost speed.
        finite: Whether `key` and `value` are known to be finite. If not, NaN and Inf reach exactly the rows that see
            them, at some cost.
        limit: What a bias may raise logits to [U, H, R], at some cost; None for no bound.

    Returns:
        Output [U, H, R, Dv] and log-sum-exp [U, H, R]; zeros and -inf for rows that see nothing.
    """
    if not key.shape[1]:
        return query.new_zeros(*query.shape[:3], value.shape[2]), query.new_full(query.shape[:3], -math.inf)
    if softcap or not finite or limit is not None or not query.is_cpu:
        return _attend_plainly(query, key, value, bias, softcap, finite, limit)
    if bias.shape[1:3] == (1, 1):  # The kernel takes more rows at a time than heads.
        output, lse = _attend_rows(query.flatten(1, 2)[:, None], key, value, bias)
        return output.view(*query.shape[:3], -1), lse.view(query.shape[:3])
    return _attend_rows(query, key, value, bias)


def _attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` by the fused kernel."""
    heads, width = query.shape[1], max(query.shape[-1], value.shape[-1])
    padded = (
        torch.nn.functional.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value)
    )
    query, key, value_ = padded
    key, value_ = (x[:, None].expand(-1, heads, -1, -1) for x in (key, value_))
    output, lse = _fused(
        query, key, value_, 0.0, False, attn_mask=bias.expand(-1, heads, query.shape[2], -1), scale=1.0
    )
    empty = bias.amax(-1) == -math.inf
    return output[..., : value.shape[-1]], lse.masked_fill(empty, -math.inf)


def _attend_plainly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    softcap: float,
    finite: bool,
    limit: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = soft_cap(query @ key[:, None].transpose(-1, -2), softcap)
    biased = logits + bias
    if limit is not None:
        biased = torch.minimum(biased, torch.maximum(logits, limit[..., None]))
    logits = biased if finite else torch.where(bias == -math.inf, -math.inf, biased)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp().to(value.dtype)
    if finite:
        return weights @ value[:, None], lse
    clean = value.isfinite()
    output = weights @ torch.where(clean, value, 0)[:, None]
    reached = (weights != 0).to(value.dtype) @ (~clean).to(value.dtype)[:, None]
    return output.masked_fill(reached > 0, math.nan), lse
