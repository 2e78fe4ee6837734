"""The operators ``torch.ops.s2o.attention_varlen`` and ``attention_varlen_out``: many requests in one call.

Both are compositions that validate, cast under autocast and call `varlen`, which is opaque to the compiler: which
requests run sparse depends on their lengths, and these change from call to call. Each request that is worth it is
gathered and attended alone, by ``torch.ops.s2o.attention``. All others run dense: on a GPU by one call of
FlashAttention, elsewhere, or with what that lacks, by the same operator one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .config import S2OConfig, replaced
from .dense import positive_scale
from .dispatch import DENSE_AT_ANY_LENGTH, choose_sparse
from .distributed import refuse_context_parallel, refuse_dtensors
from .fused import attend_packed, can_attend_packed
from .operator import autocast, library
from .paged import check_pages, gathered, joined, merged
from .requests import Request, check_room, read_requests
from .result import AttentionResult
from .rule.sinks import add_sinks
from .validation import validate_varlen
from .visibility import Visibility

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


class _Call(NamedTuple):
    """What all requests of a call share."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor | None
    scale: float | None
    window_size: Sequence[int]
    softcap: float
    sinks: torch.Tensor | None
    site: str
    config: S2OConfig

    def is_sparse(self, request: Request) -> bool:
        """Whether a request is worth the sparse path, by its own shape."""
        (_, heads, width), (kv_heads, wide) = self.query.shape, self.value.shape[-2:]
        queries, keys = request.query_count, request.key_count
        shapes = (1, heads, queries, width), (1, kv_heads, keys, width), (1, kv_heads, keys, wide)
        terms = self.terms(request).simplified(queries, keys)
        return bool(choose_sparse(*shapes, terms, self.query.device, self.config))

    def terms(self, request: Request) -> Visibility:
        """What a request's queries see of its keys."""
        return visibility_of(request.query_count, request.key_count, self.window_size)

    def operands(self, requests: Sequence[Request]) -> tuple[torch.Tensor, ...]:
        """Query, key and value of some requests, one request after the other: [L, H, D] each."""
        query = joined(self.query, [request.rows for request in requests])
        return query, *(gathered(pool, self.table, requests) for pool in (self.key, self.value))

    def attend_alone(self, request: Request, config: S2OConfig) -> torch.Tensor:
        """The output of the operator for one request, [Lq, Hq, Dv]."""
        is_causal, offset, _, window, *_ = self.terms(request)
        output = torch.ops.s2o.attention(
            *(x.transpose(0, 1)[None] for x in self.operands([request])), is_causal, offset, scale=self.scale,
            window=window, softcap=self.softcap, sinks=self.sinks, site=self.site, **config.arguments(),
        )  # fmt: skip
        return output[0].transpose(0, 1)

    def attend_together(self, requests: Sequence[Request]) -> torch.Tensor:
        """The output of FlashAttention for all of some requests, which have keys, [sum of their queries, Hq, Dv]."""
        query, key, value = self.operands(requests)
        query, scale = positive_scale(query, self.scale)
        query_lengths = [request.query_count for request in requests]
        key_lengths = [request.key_count for request in requests]
        output, lse = attend_packed(query, key, value, query_lengths, key_lengths, self.window_size, scale)
        if self.sinks is None:
            return output
        of_heads = AttentionResult(output.transpose(0, 1)[None], lse[None], lse)
        return add_sinks(of_heads, self.sinks).output[0].transpose(0, 1)


def visibility_of(queries: int, keys: int, window_size: Sequence[int]) -> Visibility:
    """What (left, right) lets queries see that stand at the last keys; -1 bounds nothing on its side."""
    left, right = window_size
    # The key that is `right` after the own one counts as the last of a causal mask and of a window.
    ahead = max(right, 0)
    window = None if left < 0 else left + ahead + 1
    return Visibility(right >= 0, keys - queries + ahead, window=window)


def _varlen(out: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
    cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, seqused_k, table, softcap, sinks, site, settings = rest
    requests = read_requests(cu_seq_q, cu_seq_k, seqused_k, table is not None)
    room = len(key) if table is None else table.shape[1] * key.shape[1]
    check_room(requests, len(query), room, max_q, max_k)
    if table is not None and table.is_cpu:
        check_pages(table, requests, *key.shape[:2])
    config = S2OConfig.from_json(settings)
    call = _Call(query, key, value, table, scale, window_size, softcap, sinks, site, config)
    dense = []
    for request in requests:
        if request.query_count and call.is_sparse(request):
            out[request.rows] = call.attend_alone(request, config)
        elif request.query_count:
            dense.append(request)
    _attend_densely(out, dense, call)


def _attend_densely(out: torch.Tensor, requests: Sequence[Request], call: _Call) -> None:
    """Fill the rows of requests that have queries by dense attention."""
    if call.softcap or not can_attend_packed(call.query, call.key, call.value):
        config = replaced(call.config, min_length=DENSE_AT_ANY_LENGTH)
        for request in requests:
            out[request.rows] = call.attend_alone(request, config)
        return
    for request in requests:
        if not request.key_count:
            out[request.rows] = 0
    some = [request for request in requests if request.key_count]
    if not some:
        return
    runs = merged([request.rows for request in some])
    outputs = call.attend_together(some).split([run.stop - run.start for run in runs])
    for run, output in zip(runs, outputs, strict=True):
        out[run] = output


def _varlen_fake(*_: Any) -> None:
    """Writes nothing, and says nothing of shapes."""


library.impl("attention_varlen", attention_varlen, "CompositeImplicitAutograd")
library.impl("attention_varlen_out", attention_varlen_out, "CompositeImplicitAutograd")
library.impl("varlen", _varlen, "CPU")
library.impl("varlen", _varlen, "CUDA")
torch.library.register_fake("s2o::varlen", _varlen_fake, lib=library)
