"""The Python front of the operator."""

from __future__ import annotations

from typing import Literal, overload

import torch

from .ops import AttentionResult, S2OConfig


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = ...,
    causal_offset: int = ...,
    key_padding: torch.Tensor | None = ...,
    scale: float | None = ...,
    config: S2OConfig | None = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = ...,
    causal_offset: int = ...,
    key_padding: torch.Tensor | None = ...,
    scale: float | None = ...,
    config: S2OConfig | None = ...,
    *,
    return_stats: Literal[True],
) -> AttentionResult: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    causal_offset: int = 0,
    key_padding: torch.Tensor | None = None,
    scale: float | None = None,
    config: S2OConfig | None = None,
    return_stats: bool = False,
) -> torch.Tensor | AttentionResult:
    """Attention that visits keys in order of importance and stops when the rest no longer matters.

    Args:
        query: [B, Hq, Lq, D], float16, bfloat16 or float32; D up to 256.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Lk, Dv], Dv up to 256.
        is_causal: Whether query i sees only the keys up to i + `causal_offset`.
        causal_offset: 0 counts from the top left, as SDPA does; Lk - Lq suits a chunk that continues a cache.
        key_padding: [B, Lk] boolean, True for keys that may be attended; None for all.
        scale: Factor of the logits, by default D ** -0.5.
        config: The settings, by default ``S2OConfig()``.
        return_stats: Whether to return the log-sum-exp and the visited work as well.

    Returns:
        The output [B, Hq, Lq, Dv]; with `return_stats` an `AttentionResult` of output, lse and visited.

    Raises:
        TypeError: A dtype is not supported.
        ValueError: Shapes or devices do not fit, or a gradient is asked for.
    """
    operator = torch.ops.s2o.attention_stats if return_stats else torch.ops.s2o.attention
    fields = (config or S2OConfig()).arguments()
    result = operator(query, key, value, is_causal, causal_offset, key_padding, scale, **fields)
    return AttentionResult(*result) if return_stats else result
