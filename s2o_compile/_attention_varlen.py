"""The Python front of the operator for packed requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .ops import S2OConfig


def attention_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor | Sequence[int],
    cu_seq_k: torch.Tensor | Sequence[int] | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    seqused_k: torch.Tensor | Sequence[int] | None = None,
    block_table: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: S2OConfig | None = None,
) -> torch.Tensor:
    """`attention` for many requests in one call: queries packed one request after the other, keys packed or paged.

    The arguments and their order are those of ``torch.nn.attention.varlen.varlen_attn``; fewer KV heads than query
    heads need no flag. Each request that is worth it runs sparse, as `attention` chooses by its own shape, and gives
    the bits of `attention` called on it alone; where keys rank in float8 alone, as by default from sm_89 on without a
    window or a soft cap, it reads pages where they are. All others run dense: on a GPU those of up to 8 queries, in a
    kernel that does so too; longer ones are gathered for calls of FlashAttention where that takes them (half precision,
    no soft cap, keys and values of one width that is a multiple of 8). The rest, and all on a CPU, run one by one. At
    threshold 0 all this is dense attention to rounding.

    Lengths must be known on the host. Lists and tensors on a CPU are read as they are; if `cu_seq_q`, `cu_seq_k` or
    `seqused_k` is on a GPU, each call waits for it, once. What is not a key of a request changes nothing, NaN included:
    pages that it does not use, what its last page holds beyond its keys, and entries of `block_table` beyond its pages.

    Args:
        query: [T, Hq, D], float16, bfloat16 or float32; D up to 256.
        key: [Tk, Hkv, D], Hq a multiple of Hkv; with `block_table` pages [blocks, block size, Hkv, D], of any block
            size and any strides: a cache [blocks, Hkv, block size, D] is passed as its ``transpose(1, 2)``.
        value: As `key`, of Dv channels, up to 256.
        cu_seq_q: [N + 1] int32 or int64, where each request's queries start and where the last one's end; rows after
            that belong to no request.
        cu_seq_k: [N + 1], the same of packed keys; not looked at with a `block_table`, where it may be None.
        max_q: At least the most queries of a request.
        max_k: At least the most keys of a request.
        scale: Factor of the logits, by default D ** -0.5.
        window_size: (left, right), the keys before and after its own one that a query sees besides it, -1 for no bound;
            the last query of a request stands at its last key. (-1, 0) is causal, and (W - 1, 0) is the causal
            ``window=W`` of `attention`.
        seqused_k: [N] int32 or int64, a request's keys: the first of its pages, or of what is packed for it, of which
            None takes all.
        block_table: [N, M] int32 or int64, the pages of each request in order, on the device of query.
        softcap: As in `attention`.
        sinks: As in `attention`, [Hq].
        out: [T, Hq, Dv], of the dtype and on the device of query: where the output is written. Rows of no request stay
            as they are.
        config: The settings, by default ``S2OConfig()``.

    Returns:
        The output [T, Hq, Dv], `out` if it was given; else rows of no request are zeros.

    Raises:
        RuntimeError: The call is inside torch's ``context_parallel``.
        TypeError: A dtype is not supported, a tensor is a DTensor, or `config` has the wrong type.
        ValueError: Shapes, devices, lengths, pages or a number do not fit, or a gradient is asked for. Pages are not
            checked on a GPU, for which the host would have to wait.
    """
    arguments = {
        "scale": scale,
        "window_size": window_size,
        "seqused_k": _on_host(seqused_k),
        "block_table": block_table,
        "softcap": softcap,
        "sinks": sinks,
        **S2OConfig.of(config).arguments(),
    }
    packed = (query, key, value, _on_host(cu_seq_q), _on_host(cu_seq_k), max_q, max_k)
    if out is None:
        return torch.ops.s2o.attention_varlen(*packed, **arguments)
    torch.ops.s2o.attention_varlen_out(out, *packed, **arguments)
    return out


def _on_host(lengths: torch.Tensor | Sequence[int] | None) -> torch.Tensor | None:
    """Lengths as a tensor, on the host if they are none yet."""
    if lengths is None or isinstance(lengths, torch.Tensor):
        return lengths
    return torch.tensor(lengths, dtype=torch.int64)
