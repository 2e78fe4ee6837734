"""Dense attention with the operator's terms: what short calls run, through the best backend of SDPA."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from .fused import attend_window, can_attend_window
from .pieces import attend_in_pieces
from .result import AttentionResult
from .rule.sinks import add_sinks
from .rule.softmax import soft_cap
from .sizes import statically_known_true
from .surroundings import is_packaging, is_transformed
from .visibility import Visibility

LARGE_MASK = 2**20
"""Pairs of queries and keys from which a mask costs more than what avoids it."""
_NARROW_WINDOW = 1024
"""The longest window for which FlashAttention is faster than the kernel: 1.3 ms and 1.9 for 512, 7.0 and 5.0 for 4,096
(H200, 32,768 positions, 32 heads over 8 of 128 channels)."""


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Visibility, scale: float | None
) -> torch.Tensor:
    """SDPA with a scale above 0; shapes as in `ops.operator`. Rows with nothing to attend to give zeros."""
    if is_plain(visibility):
        return plain_attention(query, key, value, visibility.is_causal, scale)
    if _avoids_mask(query, key, visibility):
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.s2o.dense(query, key, value, *visibility[:-1], factor, 0.0, None)
    mask, grouped = _mask(visibility, query, key), query.shape[1] != key.shape[1]
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return output.masked_fill(~mask.any(-1, keepdim=True), 0)


def is_plain(visibility: Visibility) -> bool:
    """Whether SDPA knows such a mask by name: none, or a causal one from the first key on."""
    return visibility.is_plain and (not visibility.is_causal or statically_known_true(visibility.causal_offset == 0))


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float | None
) -> torch.Tensor:
    """SDPA without a mask, of grouped heads too."""
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def attend_without_mask(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Dense attention of some queries and keys without a general mask, none of which is written out for all of them.

    With a soft cap or sinks, it is only for what `attends_by_kernel`. The output [B, Hq, Lq, Dv] is stored as
    [B, Lq, Hq, Dv]. docs/decisions/010-dense-without-masks.md says what was measured.
    """
    by_sdpa = not softcap and sinks is None
    if by_sdpa and _is_narrow(visibility) and can_attend_window(query, key, value, visibility.causal_offset):
        assert visibility.window is not None
        return attend_window(query, key, value, visibility.window, scale)
    if (by_sdpa and visibility.is_plain) or not attends_by_kernel(query):
        return attend_in_pieces(query, key, value, visibility, scale)
    from .kernels.dense import attend_densely

    output, lse = attend_densely(query, key, value, visibility, scale, softcap)
    return output if sinks is None else add_sinks(AttentionResult(output, lse, lse), sinks).output


def attends_by_kernel(query: torch.Tensor) -> bool:
    """Whether there is a fast kernel for dense attention with all terms: in half precision on a GPU."""
    return query.is_cuda and query.dtype != torch.float32


def is_large(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a mask of all queries and keys may cost more than what avoids it."""
    return not statically_known_true(query.shape[2] * key.shape[2] < LARGE_MASK)


def _avoids_mask(query: torch.Tensor, key: torch.Tensor, visibility: Visibility) -> bool:
    if visibility.mask is not None or not is_large(query, key):
        return False
    return not (is_packaging() or is_transformed())


def _is_narrow(visibility: Visibility) -> bool:
    """Whether the terms are a causal window that is so short that FlashAttention is faster than the kernel."""
    window = visibility.window
    return window is not None and window <= _NARROW_WINDOW and visibility.is_causal and visibility.is_positional


def positive_scale(query: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, float | None]:
    """A query and a scale above 0 (or None, the default) with the same logits.

    SDPA on a CPU multiplies the causal mask by the scale as well, so that one of 0 or below gives NaN.
    """
    if scale is None or scale > 0:
        return query, scale
    return (-query, -scale) if scale < 0 else (query * 0, 1.0)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of a few queries, whose probabilities are small enough to hold, with what SDPA lacks."""
    batch, heads, length, width = query.shape
    kv_heads, keys = key.shape[1:3]
    logits = query.float().reshape(batch, kv_heads, -1, width) @ key.float().mT * scale
    logits = soft_cap(logits, softcap).view(batch, heads, length, keys)
    logits = logits.masked_fill(~_mask(visibility, query, key), -math.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float()[:, None, None])
    weights = (logits - lse.masked_fill(lse == -math.inf, 0)).exp()
    output = weights.view(batch, kv_heads, -1, keys) @ value.float()
    return output.view(batch, heads, length, -1).to(query.dtype)


def _mask(visibility: Visibility, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return visibility.as_mask(query.shape[0], query.shape[2], key.shape[2], key.device)
