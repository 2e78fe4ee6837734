"""What a call of the operator may be; everything else ends here, in one sentence."""

from __future__ import annotations

import math

import torch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


def validate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding: torch.Tensor | None,
    scale: float | None,
) -> None:
    """Check the tensors and the scale of a call; shapes as in `ops.operator`.

    Raises:
        TypeError: A tensor has a dtype that is not supported.
        ValueError: Ranks, shapes, devices or the scale do not fit, or a gradient is asked for.
    """
    tensors = {"query": query, "key": key, "value": value}
    for name, tensor in tensors.items():
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [batch, heads, length, channels], not {tensor.dim()}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, not {_short(tensor.dtype)}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query ({_short(query.dtype)}), not {_short(tensor.dtype)}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query ({query.device}), not {tensor.device}")
        if tensor.shape[0] != query.shape[0]:
            raise ValueError(f"{name} must have the batch size of query ({query.shape[0]}), not {tensor.shape[0]}")
        if not 1 <= tensor.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have 1 to {MAX_HEAD_DIM} channels, not {tensor.shape[3]}")
    if query.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"query must be on a CPU or a CUDA device, not {query.device}")
    if key.shape[3] != query.shape[3]:
        raise ValueError(f"key must have the channels of query ({query.shape[3]}), not {key.shape[3]}")
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value must have the heads of key ({key.shape[1]}), not {value.shape[1]}")
    if value.shape[2] != key.shape[2]:
        raise ValueError(f"value must have the length of key ({key.shape[2]}), not {value.shape[2]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] or query.shape[1] == 0:
        raise ValueError(
            f"query must have a positive multiple of the heads of key ({key.shape[1]}), not {query.shape[1]} heads"
        )
    if key_padding is not None:
        _validate_padding(key_padding, key)
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise ValueError(
            "query, key and value must not require gradients: s2o.attention has no backward; "
            "call it under torch.no_grad() or torch.inference_mode(), or detach its inputs"
        )


def _validate_padding(key_padding: torch.Tensor, key: torch.Tensor) -> None:
    if key_padding.dtype != torch.bool:
        raise TypeError(f"key_padding must be boolean, True for keys to attend, not {_short(key_padding.dtype)}")
    if key_padding.dim() != 2 or key_padding.shape[0] != key.shape[0] or key_padding.shape[1] != key.shape[2]:
        raise ValueError(
            f"key_padding must be [batch, keys] ({key.shape[0]}, {key.shape[2]}), not {tuple(key_padding.shape)}"
        )
    if key_padding.device != key.device:
        raise ValueError(f"key_padding must be on the device of query ({key.device}), not {key_padding.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
