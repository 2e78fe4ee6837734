"""The operators ``torch.ops.s2o.attention_varlen`` and ``attention_varlen_out``: many requests in one call.

Both are compositions that validate, cast under autocast and call `varlen`, which is opaque to the compiler: which
requests run sparse depends on their lengths, and these change from call to call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .config import S2OConfig
from .distributed import refuse_context_parallel, refuse_dtensors
from .operator import autocast, library, without_autocast
from .packed import Packed, attend_requests
from .paged import check_pages
from .requests import bounded, check_room, read_requests
from .validation import validate_varlen

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k, *, "
    "float? scale=None, SymInt[] window_size=[-1, -1], Tensor? seqused_k=None, Tensor? block_table=None, "
    'float softcap=0.0, Tensor? sinks=None, str site="", '
    f'float threshold={S2OConfig().threshold}, int? min_length=None, int last_queries=0, str settings=""'
)

library.define(f"attention_varlen({_ARGUMENTS}) -> Tensor")
library.define(f"attention_varlen_out(Tensor(a!) out, {_ARGUMENTS}) -> ()")
library.define(
    "varlen(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, SymInt max_q, "
    "SymInt max_k, float? scale, SymInt[] window_size, Tensor? seqused_k, Tensor? block_table, float softcap, "
    "Tensor? sinks, str site, str settings) -> ()"
)


def attention_varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any, **keywords: Any) -> Any:
    """The implementation of the operator, whose arguments and errors ``s2o_compile.attention_varlen`` documents.

    Rows of the output that belong to no request are zeros.
    """
    query, key, value = autocast(query, key, value)
    # Of what does not fit, `validate_varlen` says so.
    shape = (*query.shape[:2], *value.shape[-1:])
    out = query.new_zeros(shape)
    attention_varlen_out(out, query, key, value, *rest, **keywords)
    return out


def attention_varlen_out(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: Sequence[int] = (-1, -1),
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    site: str = "",
    **settings: Any,
) -> None:
    """`attention_varlen`, written to the rows of `out` [T, Hq, Dv] that belong to a request; no other row changes."""
    refuse_context_parallel()
    refuse_dtensors(query=query, key=key, value=value, out=out)
    query, key, value = autocast(query, key, value)
    config = S2OConfig.from_arguments(**settings)
    validate_varlen(
        out, query, key, value, cu_seq_q, cu_seq_k, seqused_k, block_table, window_size, scale, softcap, sinks
    )
    torch.ops.s2o.varlen(
        out, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, seqused_k, block_table, softcap,
        sinks, site, config.as_json,
    )  # fmt: skip


def _varlen(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
    cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, seqused_k, table, softcap, sinks, site, settings = rest
    requests = read_requests(cu_seq_q, cu_seq_k, seqused_k, table is not None)
    room = len(key) if table is None else table.shape[1] * key.shape[1]
    check_room(requests, len(query), room, max_q, max_k)
    if table is not None and table.is_cpu:
        check_pages(table, requests, *key.shape[:2])
    window, config = bounded(window_size), S2OConfig.from_json(settings)
    with without_autocast(query.device.type):
        attend_requests(out, requests, Packed(query, key, value, table, scale, window, softcap, sinks, site, config))


def _varlen_fake(*_: Any) -> None:
    """Writes nothing, and says nothing of shapes."""


library.impl("attention_varlen", attention_varlen, "CompositeImplicitAutograd")
library.impl("attention_varlen_out", attention_varlen_out, "CompositeImplicitAutograd")
library.impl("varlen", _varlen, "CPU")
library.impl("varlen", _varlen, "CUDA")
torch.library.register_fake("s2o::varlen", _varlen_fake, lib=library)
