"""PyTorch's fused attention with its log-sum-exp, which SDPA computes and does not return.

These operators have no public names. This module alone calls them, with `ops.cpu.flash`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

from .upload import uploaded

_aten = torch.ops.aten


def can_give_lse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `with_lse` takes these tensors."""
    if query.shape[3] != value.shape[3]:
        return False
    return query.is_cpu or _backend(query, key, value) is not None


def with_lse(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention, and its log-sum-exp; shapes as in `ops.operator`, as many queries as keys if `is_causal`.

    Returns:
        Output [B, Hq, Lq, D] and log-sum-exp [B, Hq, Lq], float32.
    """
    if query.is_cpu:
        # Unlike SDPA, this operator takes the elements of a row to lie side by side.
        query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
        key, value = (_for_each_head(x, query.shape[1]) for x in (key, value))
        output, lse = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, scale=scale)
    elif _backend(query, key, value) == "cudnn":
        output, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, is_causal, scale=scale
        )
    else:
        key, value = (_for_each_head(x, query.shape[1]) for x in (key, value))
        output, lse, *_ = _aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)
    return output, lse.view(query.shape[:3]).float()


def can_attend_window(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int) -> bool:
    """Whether `attend_window` takes these tensors, of which query i stands at key i + offset."""
    width = query.shape[3]
    if not query.is_cuda or width % 8 or value.shape[3] != width or key.shape[2] != query.shape[2] + offset:
        return False
    return can_use_flash_attention(_parameters(query, key, value))


def attend_window(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int, scale: float
) -> torch.Tensor:
    """Causal attention by FlashAttention of queries that stand at the last keys, each to the `window` keys up to it."""
    packed = (x.transpose(1, 2) for x in (query, key, value))
    output, *_ = _aten._flash_attention_forward(
        *packed, None, None, query.shape[2], key.shape[2], 0.0, True, False,
        scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return output.transpose(1, 2)


def can_attend_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend_packed` takes queries, keys and values like these: [..., heads, D], on a GPU and of one width."""
    width = query.shape[-1]
    if not query.is_cuda or not width or width % 8 or value.shape[-1] != width or not key.shape[-2]:
        return False
    return can_use_flash_attention(_parameters(*(x.new_empty(1, x.shape[-2], 1, width) for x in (query, key, value))))


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    window_size: Sequence[int],
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by FlashAttention of packed requests, whose last query stands at the last key, without waiting.

    Args:
        query: [sum of `query_lengths`, Hq, D].
        key: [sum of `key_lengths`, Hkv, D].
        value: As `key`.
        query_lengths: Of each request.
        key_lengths: Of each request, above 0.
        window_size: The keys before and after the own one that a query sees; -1 for all.
        scale: Factor of the logits above 0, by default D ** -0.5.

    Returns:
        Output, like `query`, and log-sum-exp [Hq, sum of `query_lengths`], float32, -inf for rows that see nothing.
    """
    left, right = window_size
    starts = (uploaded([0, *itertools.accumulate(x)], query.device) for x in (query_lengths, key_lengths))
    output, lse, *_ = _aten._flash_attention_forward(
        *(x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)), *starts,
        max(query_lengths), max(key_lengths), 0.0, (left, right) == (-1, 0), False,
        scale=scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return output, lse.masked_fill(lse == math.inf, -math.inf)


def _backend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """The fused backend for tensors on a GPU: cuDNN from Hopper on, where it is the faster one; None for neither."""
    if query.shape[3] % 8:
        return None
    parameters = _parameters(query, key, value)
    if torch.cuda.get_device_capability(query.device)[0] >= 9 and can_use_cudnn_attention(parameters):
        return "cudnn"
    return "flash" if can_use_flash_attention(parameters) else None


def _parameters(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> SDPAParams:
    return SDPAParams(query, key, value, None, 0.0, False, query.shape[1] != key.shape[1])


def _for_each_head(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
