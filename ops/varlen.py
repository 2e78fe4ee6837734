"""The operators ``torch.ops.s2o.attention_varlen`` and ``attention_varlen_out``: many requests in one call.

Both are compositions that validate, cast under autocast and call `varlen`, which is opaque to the compiler: which
requests run sparse depends on their lengths, and these change from call to call. Each request that is worth it is
gathered and attended alone, by ``torch.ops.s2o.attention``. All others run dense: on a GPU by one call of
FlashAttention, or with what that lacks in a few batches and one by one; on a CPU one by one, which costs little there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .config import S2OConfig, replaced
from .dense import positive_scale
from .dispatch import DENSE_AT_ANY_LENGTH, choose_sparse, dense_queries
from .distributed import refuse_context_parallel, refuse_dtensors
from .fused import attend_packed, can_attend_packed
from .operator import autocast, library
from .padded import attend_padded, of_similar_length
from .paged import check_pages, gathered, joined, merged
from .requests import Request, check_room, read_requests, visibility_of
from .result import AttentionResult
from .rule.sinks import add_sinks
from .validation import validate_varlen
from .visibility import Visibility

_FEW_QUERIES = 8
"""Up to how many queries a request may have to be padded into a batch with others."""

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
        if self.config.min_length != 0 and request.query_count <= dense_queries(self.config):
            return False  # As `choose_sparse` says, in a tenth of the time: most requests decode.
        (_, heads, width), (kv_heads, wide) = self.query.shape, self.value.shape[-2:]
        queries, keys = request.query_count, request.key_count
        shapes = (1, heads, queries, width), (1, kv_heads, keys, width), (1, kv_heads, keys, wide)
        terms = self.terms(request).simplified(queries, keys)
        return bool(choose_sparse(*shapes, terms, self.query.device, self.config))

    def terms(self, request: Request) -> Visibility:
        """What a request's queries see of its keys."""
        return visibility_of(request.query_count, request.key_count, self.window_size)

    def operands(self, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of some requests, one request after the other: [L, H, D] each."""
        query = joined(self.query, [request.rows for request in requests])
        return query, gathered(self.key, self.table, requests), gathered(self.value, self.table, requests)

    @property
    def pads(self) -> bool:
        """Whether requests of few queries are padded into a batch, as each call costs the host much of its time."""
        return self.query.is_cuda

    def attend_sparsely(self, request: Request) -> torch.Tensor:
        """The output of the operator for one request, [Lq, Hq, Dv]."""
        return self._attend(request, self.config)

    def attend_densely(self, requests: Sequence[Request]) -> torch.Tensor:
        """The output of the operator for a single request, dense, [Lq, Hq, Dv]."""
        (request,) = requests
        return self._attend(request, self._dense_config)

    def attend_padded(self, requests: Sequence[Request]) -> torch.Tensor:
        """The output of the operator for a batch of requests, dense, [sum of their queries, Hq, Dv]."""
        return attend_padded(
            *self.operands(requests), requests, self.window_size, scale=self.scale, softcap=self.softcap,
            sinks=self.sinks, site=self.site, **self._dense_config.arguments(),
        )  # fmt: skip

    def _attend(self, request: Request, config: S2OConfig) -> torch.Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in self.operands([request]))
        output = torch.ops.s2o.attention(
            query, key, value, **self.terms(request)._asdict(), scale=self.scale, softcap=self.softcap,
            sinks=self.sinks, site=self.site, **config.arguments(),
        )  # fmt: skip
        return output[0].transpose(0, 1)

    @property
    def _dense_config(self) -> S2OConfig:
        return replaced(self.config, min_length=DENSE_AT_ANY_LENGTH)

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
            out[request.rows] = call.attend_sparsely(request)
        elif request.query_count:
            dense.append(request)
    _attend_densely(out, dense, call)


def _attend_densely(out: torch.Tensor, requests: Sequence[Request], call: _Call) -> None:
    """Fill the rows of requests that have queries by dense attention, in as few calls as there is a way for."""
    some = []
    for request in requests:
        if request.key_count:
            some.append(request)
        else:
            out[request.rows] = 0
    if not call.softcap and can_attend_packed(call.query, call.key, call.value):
        _attend_groups(out, [some], call.attend_together)
        return
    few: list[Request] = []
    alone: list[list[Request]] = []
    for request in some:
        if call.pads and request.query_count <= _FEW_QUERIES:
            few.append(request)
        else:
            alone.append([request])
    _attend_groups(out, of_similar_length(few), call.attend_padded)
    _attend_groups(out, alone, call.attend_densely)


def _attend_groups(
    out: torch.Tensor, groups: Sequence[Sequence[Request]], attend: Callable[[Sequence[Request]], torch.Tensor]
) -> None:
    """Fill the rows of requests, group by group."""
    for group in groups:
        if group:
            runs = merged([request.rows for request in group])
            outputs = attend(group).split([run.stop - run.start for run in runs])
            for run, output in zip(runs, outputs, strict=True):
                out[run] = output


def _varlen_fake(*_: Any) -> None:
    """Writes nothing, and says nothing of shapes."""


library.impl("attention_varlen", attention_varlen, "CompositeImplicitAutograd")
library.impl("attention_varlen_out", attention_varlen_out, "CompositeImplicitAutograd")
library.impl("varlen", _varlen, "CPU")
library.impl("varlen", _varlen, "CUDA")
torch.library.register_fake("s2o::varlen", _varlen_fake, lib=library)
