"""What a call of the operator may be; everything else ends here, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.autograd.forward_ad import unpack_dual

from .sizes import statically_known_true
from .surroundings import is_transformed
from .visibility import Visibility

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
LARGEST_SOFTCAP = 1e30
"""Quotients of logits by more than that lose digits in float32."""


def validate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float | None,
    softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    """Check the tensors and numbers of a call; shapes as in `ops.operator`.

    Raises:
        TypeError: A tensor has a dtype that is not supported.
        ValueError: Ranks, shapes, devices or a number do not fit, or a derivative is asked for.
    """
    tensors = {"query": query, "key": key, "value": value}
    dtype, device, query_shape = query.dtype, query.device, query.shape
    if dtype not in DTYPES:
        raise TypeError(f"query must be float16, bfloat16 or float32, not {dtype_name(dtype)}")
    for name, tensor in tensors.items():
        shape = tensor.shape
        if len(shape) != 4:
            raise ValueError(f"{name} must have 4 dimensions [batch, heads, length, channels], not {len(shape)}")
        if tensor.dtype != dtype:
            raise TypeError(
                f"{name} must have the dtype of query ({dtype_name(dtype)}), not {dtype_name(tensor.dtype)}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} must be on the device of query ({device}), not {tensor.device}")
        if shape[0] != query_shape[0]:
            raise ValueError(f"{name} must have the batch size of query ({query_shape[0]}), not {shape[0]}")
        if shape[3] > MAX_HEAD_DIM:
            raise ValueError(f"{name} must have at most {MAX_HEAD_DIM} channels, not {shape[3]}")
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"query must be on a CPU or a CUDA device, not {device}")
    (_, heads, _, channels), (_, kv_heads, keys, key_channels) = query_shape, key.shape
    if key_channels != channels:
        raise ValueError(f"key must have the channels of query ({channels}), not {key_channels}")
    if value.shape[1] != kv_heads:
        raise ValueError(f"value must have the heads of key ({kv_heads}), not {value.shape[1]}")
    if value.shape[2] != keys:
        raise ValueError(f"value must have the length of key ({keys}), not {value.shape[2]}")
    if kv_heads and heads % kv_heads:
        raise ValueError(f"query must have a multiple of the heads of key ({kv_heads}), not {heads} heads")
    _validate_visibility(query, key, visibility)
    if isinstance(scale, (int, float)) and not math.isfinite(scale):
        raise ValueError(f"scale must be finite, not {scale}")
    if isinstance(softcap, (int, float)) and not 0 <= softcap <= LARGEST_SOFTCAP:
        raise ValueError(f"softcap must be between 0 (for none) and {LARGEST_SOFTCAP:g}, not {softcap}")
    if sinks is not None:
        _validate_sinks(sinks, query)
        tensors["sinks"] = sinks
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        raise ValueError(
            "query, key, value and sinks must not require gradients: s2o.attention has no backward; "
            "call it under torch.no_grad() or torch.inference_mode(), or detach its inputs"
        )
    if is_transformed() and any(unpack_dual(tensor).tangent is not None for tensor in tensors.values()):
        raise ValueError(
            "query, key, value and sinks must not have tangents, as torch.func.jvp gives them: s2o.attention has no "
            "derivative"
        )


def validate_varlen(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
    window_size: Sequence[int],
    scale: float | None,
    softcap: float,
    sinks: torch.Tensor | None,
) -> None:
    """Check the tensors and numbers of a call of packed requests, but for what lengths and pages say.

    Shapes are those of ``s2o_compile.attention_varlen``.

    Raises:
        TypeError: A tensor has a dtype that is not supported.
        ValueError: Ranks, shapes, devices or a number do not fit, or a gradient is asked for.
    """
    _validate_packed(query, key, value, paged=block_table is not None)
    in_a_batch = [
        x.transpose(0, 1)[None] for x in (query, *(x if block_table is None else x[:, 0] for x in (key, value)))
    ]
    validate(in_a_batch[0], in_a_batch[1], in_a_batch[2], Visibility(), scale, softcap, sinks)
    if out.dtype != query.dtype:
        raise TypeError(f"out must have the dtype of query ({dtype_name(query.dtype)}), not {dtype_name(out.dtype)}")
    shape = (*query.shape[:2], value.shape[-1])
    if tuple(out.shape) != shape:
        raise ValueError(f"out must be [rows, heads of query, channels of value] {shape}, not {tuple(out.shape)}")
    _validate_device("out", out, query)
    if len(window_size) != 2 or any(size < -1 for size in window_size):
        raise ValueError(
            f"window_size must be (left, right), each at least 0 or -1 for no bound, not {tuple(window_size)}"
        )
    _validate_lengths(query, cu_seq_q, cu_seq_k, seqused_k, block_table)


def _validate_packed(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, paged: bool) -> None:
    packed, pages = "3 dimensions [rows, heads, channels]", "4 dimensions [blocks, block size, heads, channels]"
    if query.dim() != 3:
        raise ValueError(f"query must have {packed}, not {query.dim()}")
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dim() != 3 + paged:
            reason = "with a block_table" if paged else "without a block_table"
            raise ValueError(f"{name} must have {pages if paged else packed} {reason}, not {tensor.dim()}")
    if not paged:
        return
    if key.shape[1] < 1:
        raise ValueError("key must have blocks of at least 1 key, not of 0")
    if value.shape[:2] != key.shape[:2]:
        sizes, others = tuple(key.shape[:2]), tuple(value.shape[:2])
        raise ValueError(f"value must have the blocks and the block size of key {sizes}, not {others}")


def _validate_lengths(
    query: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    if cu_seq_q.dim() != 1 or cu_seq_q.shape[0] < 1:
        raise ValueError(f"cu_seq_q must be [requests + 1], not {tuple(cu_seq_q.shape)}")
    requests = cu_seq_q.shape[0] - 1
    if block_table is None and cu_seq_k is None:
        raise ValueError("cu_seq_k must be a tensor, not None, without a block_table")
    if block_table is not None and seqused_k is None:
        raise ValueError("seqused_k must be a tensor, not None, with a block_table")
    for name, tensor, size in (
        ("cu_seq_q", cu_seq_q, requests + 1),
        ("cu_seq_k", cu_seq_k, requests + 1),
        ("seqused_k", seqused_k, requests),
    ):
        if tensor is None:
            continue
        _validate_integers(name, tensor)
        if tensor.dim() != 1 or tensor.shape[0] != size:
            what = "requests" if name == "seqused_k" else "requests + 1"
            raise ValueError(f"{name} must be [{what}] ({size},), not {tuple(tensor.shape)}")
        if tensor.device.type != "cpu":
            _validate_device(name, tensor, query)
    if block_table is not None:
        _validate_integers("block_table", block_table)
        if block_table.dim() != 2 or block_table.shape[0] != requests:
            raise ValueError(f"block_table must be [requests, blocks] ({requests}, ..), not {tuple(block_table.shape)}")
        _validate_device("block_table", block_table, query)


def _validate_integers(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, not {dtype_name(tensor.dtype)}")


def _validate_visibility(query: torch.Tensor, key: torch.Tensor, visibility: Visibility) -> None:
    keys = key.shape[2]
    if visibility.key_padding is not None:
        if visibility.key_padding.dtype != torch.bool:
            kind = dtype_name(visibility.key_padding.dtype)
            raise TypeError(f"key_padding must be boolean, True for keys to attend, not {kind}")
        _validate_by_position("key_padding", visibility.key_padding, query, "keys", keys)
    if visibility.window is not None and statically_known_true(visibility.window < 1):
        raise ValueError(f"window must be at least 1, or None for no window, not {visibility.window}")
    if visibility.query_documents is not None or visibility.key_documents is not None:
        _validate_documents(query, keys, visibility)
    if visibility.mask is not None:
        _validate_mask(visibility.mask, query, keys)


def _validate_documents(query: torch.Tensor, keys: int, visibility: Visibility) -> None:
    documents = {"query_documents": visibility.query_documents, "key_documents": visibility.key_documents}
    given = [name for name, tensor in documents.items() if tensor is not None]
    if len(given) == 1:
        raise ValueError(f"query_documents and key_documents must be given together, not {given[0]} alone")
    for (name, tensor), length in zip(documents.items(), (query.shape[2], keys), strict=True):
        if tensor is None:
            continue
        _validate_integers(name, tensor)
        _validate_by_position(name, tensor, query, "queries" if name == "query_documents" else "keys", length)


def _validate_by_position(name: str, tensor: torch.Tensor, query: torch.Tensor, what: str, length: int) -> None:
    batch = query.shape[0]
    if tensor.dim() != 2 or tensor.shape[0] != batch or tensor.shape[1] != length:
        raise ValueError(f"{name} must be [batch, {what}] ({batch}, {length}), not {tuple(tensor.shape)}")
    _validate_device(name, tensor, query)


def _validate_mask(mask: torch.Tensor, query: torch.Tensor, keys: int) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be boolean, True for pairs that may attend, not {dtype_name(mask.dtype)}")
    full = (*query.shape[:3], keys)
    sizes = zip(reversed(mask.shape), reversed(full), strict=False)
    if not 1 <= mask.dim() <= 4 or any(size != 1 and size != whole for size, whole in sizes):
        raise ValueError(
            f"mask must have 1 to 4 dimensions and broadcast to [batch, heads, queries, keys] {full}, "
            f"not {tuple(mask.shape)}"
        )
    _validate_device("mask", mask, query)


def _validate_sinks(sinks: torch.Tensor, query: torch.Tensor) -> None:
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be floating, not {dtype_name(sinks.dtype)}")
    if sinks.dim() != 1 or sinks.shape[0] != query.shape[1]:
        raise ValueError(f"sinks must be [heads of query] ({query.shape[1]},), not {tuple(sinks.shape)}")
    _validate_device("sinks", sinks, query)


def _validate_device(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of query ({query.device}), not {tensor.device}")


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its module, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")
