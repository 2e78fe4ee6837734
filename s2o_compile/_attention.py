"""The Python front of the operator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from .ops import AttentionResult, S2OConfig
from .ops.operator import attend_as_before
from .ops.process_group import sharding_of
from .ops.surroundings import is_watched

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


@overload
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = ...,
    causal_offset: int = ...,
    key_padding: torch.Tensor | None = ...,
    scale: float | None = ...,
    window: int | None = ...,
    query_documents: torch.Tensor | None = ...,
    key_documents: torch.Tensor | None = ...,
    mask: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    config: S2OConfig | None = ...,
    return_stats: Literal[False] = ...,
    mesh: DeviceMesh | ProcessGroup | None = ...,
    layout: str = ...,
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
    window: int | None = ...,
    query_documents: torch.Tensor | None = ...,
    key_documents: torch.Tensor | None = ...,
    mask: torch.Tensor | None = ...,
    softcap: float = ...,
    sinks: torch.Tensor | None = ...,
    config: S2OConfig | None = ...,
    *,
    return_stats: Literal[True],
    mesh: DeviceMesh | ProcessGroup | None = ...,
    layout: str = ...,
) -> AttentionResult: ...


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    causal_offset: int = 0,
    key_padding: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    config: S2OConfig | None = None,
    return_stats: bool = False,
    mesh: DeviceMesh | ProcessGroup | None = None,
    layout: str = "head-tail",
) -> torch.Tensor | AttentionResult:
    """Attention to the keys that matter, and to a weighted random sample of the others.

    A query sees a key where `is_causal`, `key_padding`, `window`, documents and `mask` all allow it. With documents
    or a `mask`, every query is a guide (`pool` is 1); with these or a `window`, the rule "means" becomes "sampled".

    Args:
        query: [B, Hq, Lq, D], float16, bfloat16 or float32; D up to 256.
        key: [B, Hkv, Lk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Lk, Dv], Dv up to 256.
        is_causal: Whether query i sees only the keys up to i + `causal_offset`.
        causal_offset: 0 counts from the top left, as SDPA does; Lk - Lq suits a chunk that continues a cache.
        key_padding: [B, Lk] boolean, True for keys that may be attended; None for all.
        scale: Factor of the logits, by default D ** -0.5.
        window: Query i sees only keys j with i + `causal_offset` - j < `window`, at least 1; None for no window.
            Without `is_causal` this bounds the keys from below only.
        query_documents: [B, Lq] int32 or int64, with `key_documents`: a query sees the keys of equal id only.
        key_documents: [B, Lk] int32 or int64.
        mask: Boolean, broadcastable to [B, Hq, Lq, Lk], True for pairs that may attend.
        softcap: The scaled logits become `softcap` * tanh(logits / `softcap`) (Gemma 2, arXiv 2408.00118), up to 1e30;
            0 for none.
        sinks: [Hq], a logit per head that enters the softmax's denominator without a value (gpt-oss).
        config: The settings, by default ``S2OConfig()``.
        return_stats: Whether to return the log-sum-exp and the visited work as well.
        mesh: The ranks over which the sequence is sharded, a mesh of one dimension or a process group; all of them must
            make the call. Tensors then hold the positions of this rank, as many on each, and numbers speak of positions
            in the whole sequence: with `is_causal`, position i sees those up to i + `causal_offset`. Keys and values
            are gathered (docs/distributed.md).
        layout: Which positions a rank holds, with a `mesh`: "head-tail", of 2n blocks of the sequence rank r of n has r
            and 2n - 1 - r, or "contiguous".

    Returns:
        The output [B, Hq, Lq, Dv]; with `return_stats` an `AttentionResult` of output, lse and visited.

    Raises:
        RuntimeError: The call is inside torch's ``context_parallel`` without a `mesh`, or another rank has ended.
        TypeError: A dtype is not supported, some tensors are DTensors and others are not, or `config` has the wrong
            type.
        ValueError: Shapes, devices or a number do not fit, DTensors are sharded over the sequence or the channels, or a
            gradient is asked for; with a `mesh` also where ranks hold parts of other lengths, or there is a `mask`.
    """
    config = S2OConfig.of(config)
    has_tensors = key_padding is not None or query_documents is not None or key_documents is not None
    if not has_tensors and mask is sinks is mesh is None and not return_stats and not is_watched(query, key, value):
        output = attend_as_before(query, key, value, is_causal, causal_offset, window, scale, softcap, config)
        if output is not None:
            return output
    options: dict[str, Any] = config.arguments()
    operator = torch.ops.s2o.attention_stats if return_stats else torch.ops.s2o.attention
    if mesh is not None:
        operator = torch.ops.s2o.attention_context_stats if return_stats else torch.ops.s2o.attention_context
        options |= sharding_of(mesh, layout)._asdict()
    result = operator(
        query, key, value, is_causal, causal_offset, key_padding, scale, window, query_documents, key_documents, mask,
        softcap, sinks, **options,
    )  # fmt: skip
    return AttentionResult(*result) if return_stats else result
