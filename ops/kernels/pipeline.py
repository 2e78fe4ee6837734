"""Sparse attention by the Triton kernels: pool guides, then rank and attend one run of segments after another."""

from __future__ import annotations

import bisect
import functools

import torch
from torch.library import triton_op

from ..config import S2OConfig
from ..geometry import Geometry, round_up
from ..memory import workspace
from ..result import AttentionResult
from ..visibility import Visibility
from .arguments import Arguments
from .attend import attend
from .guides import pool_guides
from .lists import Lists, bits_of_a_key
from .rank import rank, scoring_of

MAX_PROGRAMS = 2**16 - 1
"""Programs along all axes of a launch but the first: one for each list of a batch entry, of a segment."""


@triton_op("s2o::sparse_triton", mutates_args={})
def sparse_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    key_padding: torch.Tensor | None,
    window: int | None,
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
    settings: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sparse_attention` as an operator whose kernels the compiler sees; `settings` is the configuration as JSON."""
    config = S2OConfig.from_json(settings)
    visibility = Visibility(is_causal, causal_offset, key_padding, window, query_documents, key_documents, mask)
    output, lse, visited = sparse_attention(query, key, value, visibility, scale, softcap, config)
    return output, lse, visited


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    config: S2OConfig,
) -> AttentionResult:
    """Sparse attention without sinks, of some queries and keys and a scale above 0; shapes as in `ops.reference`.

    The rule is one of those with kernels (`dispatch.has_kernels`).
    """
    config = visibility.effective_config(config)
    result = AttentionResult.empty(query, value, config.ranking.tile)
    batch, heads = query.shape[:2]
    at_once = max(1, MAX_PROGRAMS // (heads if config.ranking.lists == "head" else key.shape[1]))
    if batch <= at_once:
        attend_batch(query, key, value, visibility, scale, softcap, config, result)
        return result
    for first in range(0, batch, at_once):
        part = slice(first, first + at_once)
        of_part = AttentionResult(*(x[part] for x in result))
        attend_batch(query[part], key[part], value[part], visibility.of(part), scale, softcap, config, of_part)
    return result


def attend_batch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    config: S2OConfig,
    result: AttentionResult,
) -> None:
    """Fill the `result` of as many batch entries as one launch can have programs for."""
    geometry = Geometry.of(query, key, visibility, config)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if not geometry.ranked_segments:
        arguments = Arguments(query, key, value, visibility, geometry, scale, softcap, config.without_ranking())
        attend(arguments, Lists.without_keys(arguments), range(geometry.segments), result)
        return
    arguments = Arguments(query, key, value, visibility, geometry, scale, softcap, config)
    guides = pool_guides(query.unflatten(1, (arguments.kv_heads, arguments.group_size)), config)
    scoring = scoring_of(arguments, guides)
    for segments in runs(arguments):
        attend(arguments, rank(arguments, scoring, segments), segments, result)


def runs(arguments: Arguments) -> tuple[range, ...]:
    """Consecutive segments whose lists fit into the workspace together."""
    bits = arguments.batch_kv_heads * arguments.lists * bits_of_a_key(arguments)
    return _runs(arguments.geometry, 8 * workspace() // bits)


@functools.lru_cache(maxsize=2**12)
def _runs(geometry: Geometry, room: int) -> tuple[range, ...]:
    """`runs`, of one list for each segment and `room` keys in all; at least one segment each."""

    def size(last: int) -> int:
        return (last + 1 - first) * round_up(geometry.longest_history(last))

    first, end = 0, geometry.segments
    found = []
    while first < end:
        fitting = bisect.bisect(range(first + 1, end), room, key=size)
        found.append(range(first, first + 1 + fitting))
        first += 1 + fitting
    return tuple(found)
