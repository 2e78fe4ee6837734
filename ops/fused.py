"""PyTorch's fused attention with its log-sum-exp, which SDPA computes and does not return.

These operators have no public names. This module alone calls them, with `ops.cpu.flash`.
"""

from __future__ import annotations

import torch
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention

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


def can_attend_window(query: torch.Tensor, key: torch.Tensor, offset: int) -> bool:
    """Whether `attend_window` takes these tensors, of which query i stands at key i + offset."""
    if not query.is_cuda or query.shape[3] % 8 or key.shape[2] != query.shape[2] + offset:
        return False
    return can_use_flash_attention(_parameters(query, key, key))


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
