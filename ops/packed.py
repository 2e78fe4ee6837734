"""Attention of packed requests: each that is worth it runs sparse alone, and all others run dense.

Those that run sparse are given to ``torch.ops.s2o.attention``, whose kernels read pages where they are. Of the others,
on a GPU, those of few queries run in a kernel that does so too, and the rest, whose pages are gathered, in calls of
FlashAttention, or with what that lacks one by one; on a CPU all run one by one, which costs little there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .config import S2OConfig, replaced
from .dense import positive_scale
from .dispatch import DENSE_AT_ANY_LENGTH, choose_sparse, dense_queries
from .fused import attend_packed, can_attend_packed
from .memory import workspace
from .operator import Call
from .paged import gathered, joined, merged, placed
from .part import Part
from .requests import Request, visibility_of
from .result import AttentionResult
from .rule.sinks import add_sinks
from .visibility import Visibility

_FEW_QUERIES = 8
"""Up to how many queries a request may have for the kernel that reads its keys where they are."""


class Packed(NamedTuple):
    """What all requests of a call share; shapes as in ``s2o_compile.attention_varlen``."""

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
        return bool(choose_sparse(*shapes, terms, self.query.device, self.query.dtype, self.config))

    def terms(self, request: Request) -> Visibility:
        """What a request's queries see of its keys."""
        return visibility_of(request.query_count, request.key_count, self.window_size)

    def operands(self, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of some requests, one request after the other: [L, H, D] each."""
        query = joined(self.query, [request.rows for request in requests])
        return query, gathered(self.key, self.table, requests), gathered(self.value, self.table, requests)

    def that_fit(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Requests in groups whose gathered keys and values fit into a workspace, or of one; all at once if packed."""
        if self.table is None or not requests:
            return [list(requests)] if requests else []
        groups: list[list[Request]] = [[]]
        size = self.key.element_size() * sum(pool.shape[-2] * pool.shape[-1] for pool in (self.key, self.value))
        room = workspace()
        for request in requests:
            room -= request.key_count * size
            if room < 0 and groups[-1]:
                groups.append([])
                room = workspace() - request.key_count * size
            groups[-1].append(request)
        return groups

    @property
    def decodes(self) -> bool:
        """Whether `decode` takes requests of few queries: on a GPU, where there is anything to attend with."""
        return self.query.is_cuda and 0 not in (*self.query.shape, *self.value.shape[-2:])

    def attend_sparsely(self, request: Request) -> torch.Tensor:
        """The output of the operator for one request, [Lq, Hq, Dv]."""
        if self.table is None or not self.query.is_cuda:
            return self._attend(request, self.config)
        found = placed(self.key, self.value, self.table, request)
        if found is None:
            return self._attend(request, self.config)
        key, value, places = found
        query, key, value = _of_one(self.query[request.rows], key, value)
        call = Call.of(query, key, value, **self._arguments(request), **self.config.arguments())
        return call.sparse(Part(places=places)).output[0].transpose(0, 1)

    def attend_densely(self, requests: Sequence[Request]) -> torch.Tensor:
        """The output of the operator for a single request, dense, [Lq, Hq, Dv]."""
        (request,) = requests
        return self._attend(request, self._dense_config)

    def decode(self, out: torch.Tensor, requests: Sequence[Request]) -> None:
        """Fill the rows of requests of few queries in `out` by dense attention, without gathering their keys."""
        from .kernels.decode import decode

        scale = self.query.shape[-1] ** -0.5 if self.scale is None else self.scale
        query, scale = positive_scale(self.query, scale)
        assert scale is not None
        pools = self.key, self.value, self.table
        decode(out, query, *pools, requests, self.window_size, scale, self.softcap, self.sinks)

    def _attend(self, request: Request, config: S2OConfig) -> torch.Tensor:
        operands = _of_one(*self.operands([request]))
        output = torch.ops.s2o.attention(*operands, **self._arguments(request), **config.arguments())
        return output[0].transpose(0, 1)

    def _arguments(self, request: Request) -> dict[str, Any]:
        """What the operator is called with for a request, besides tensors and settings."""
        terms = self.terms(request)._asdict()
        return terms | {"scale": self.scale, "softcap": self.softcap, "sinks": self.sinks, "site": self.site}

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


def _of_one(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries, keys or values [L, H, D] as a batch of one, [1, H, L, D]."""
    return tuple(x.transpose(0, 1)[None] for x in tensors)


def attend_requests(out: torch.Tensor, requests: Sequence[Request], call: Packed) -> None:
    """Fill the rows of requests in `out` [T, Hq, Dv]."""
    dense = []
    for request in requests:
        if request.query_count and call.is_sparse(request):
            out[request.rows] = call.attend_sparsely(request)
        elif request.query_count:
            dense.append(request)
    _attend_densely(out, dense, call)


def _attend_densely(out: torch.Tensor, requests: Sequence[Request], call: Packed) -> None:
    """Fill the rows of requests that have queries by dense attention, in as few calls as there is a way for."""
    few: dict[int, list[Request]] = {}  # By queries, up to a factor of 2: all of a call take as many rows.
    some: list[Request] = []
    for request in requests:
        if not request.key_count:
            out[request.rows] = 0
        elif request.query_count <= _FEW_QUERIES and call.decodes:
            few.setdefault((request.query_count - 1).bit_length(), []).append(request)
        else:
            some.append(request)
    for group in few.values():
        call.decode(out, group)
    if not call.softcap and can_attend_packed(call.query, call.key, call.value):
        _attend_groups(out, call.that_fit(some), call.attend_together)
    else:
        _attend_groups(out, [[request] for request in some], call.attend_densely)


def _attend_groups(
    out: torch.Tensor, groups: Sequence[Sequence[Request]], attend: Callable[[Sequence[Request]], torch.Tensor]
) -> None:
    """Fill the rows of requests, group by group."""
    for group in groups:
        runs = merged([request.rows for request in group])
        outputs = attend(group).split([run.stop - run.start for run in runs])
        for run, output in zip(runs, outputs, strict=True):
            out[run] = output
