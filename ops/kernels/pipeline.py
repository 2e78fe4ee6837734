"""Sparse attention by the Triton kernels: pool guides, then rank and attend one run of segments after another."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

import torch
from torch.library import triton_op

from ..config import S2OConfig
from ..geometry import Geometry, round_up
from ..memory import workspace
from ..part import Part, SampledQueries
from ..result import AttentionResult
from ..visibility import Visibility
from .arguments import Arguments, distances_of_values
from .attend import attend
from .guides import pool_guides
from .launch import launching, visibly
from .lists import Lists, bits_of_a_key
from .plan import Late, Tensors, planned
from .quantise import ranks_copies
from .rank import rank, scoring_of

MAX_PROGRAMS = 2**16 - 1
"""Programs along all axes of a launch but the first: one for each list of a batch entry, of a segment."""

_VALUE = 2
"""The place of values among the tensors of `rank_and_attend`."""


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
    with launching(visibly):
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
    part: Part | None = None,
) -> AttentionResult:
    """Sparse attention without sinks, of some queries and keys and a scale above 0; shapes as in `ops.reference`.

    The rule is one of those with kernels (`dispatch.has_kernels`). Queries may be a `part` of those of a sequence. If
    that has places, `reads_places` is true.
    """
    result = AttentionResult.empty(query, value, config.ranking.tile)
    batch, heads = query.shape[:2]
    at_once = max(1, MAX_PROGRAMS // (heads if config.ranking.lists == "head" else key.shape[1]))
    if batch <= at_once:
        attend_batch(query, key, value, visibility, scale, softcap, config, part, result)
        return result
    for first in range(0, batch, at_once):
        some = slice(first, first + at_once)
        tensors, of_some = (query[some], key[some], value[some]), AttentionResult(*(x[some] for x in result))
        of_part = None if part is None else part.of(some)
        attend_batch(*tensors, visibility.of(some), scale, softcap, config, of_part, of_some)
    return result


def reads_places(query: torch.Tensor, visibility: Visibility, softcap: float, config: S2OConfig) -> bool:
    """Whether kernels can look up where each key is: what ranks are copies, and a mask does not ask for positions."""
    if not visibility.is_plain or config.ranking.measure == "output":
        return False
    return ranks_copies(query, config.ranking.channels, softcap, query.device)


def attend_batch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visibility: Visibility,
    scale: float,
    softcap: float,
    config: S2OConfig,
    part: Part | None,
    result: AttentionResult,
) -> None:
    """Fill the `result` of as many batch entries as one launch can have programs for."""
    if part is not None and value.stride(-1) != 1:
        part.arrive()  # A copy reads them.
    query, key, value = _with_rows(query), _with_rows(key), _with_rows(value)
    masks, terms = visibility.tensors, visibility
    if not visibility.is_positional:
        masks = *[None if x is None else _with_rows(x) for x in masks[:3]], visibility.mask
        terms = visibility.with_tensors(None, None, None, None)
    late = None if part is None else Late(_VALUE, part.arrive)
    part, distances = part or Part(), None
    if config.ranking.measure == "output" and Geometry.of(query, key, visibility, config).ranked_segments:
        part.arrive()
        sampled = part.outputs or SampledQueries.of(query, key.shape[1], terms.with_tensors(*masks))
        distances = distances_of_values(sampled, key, value, scale, softcap)
    places = None if part.places is None else part.places.rows
    tensors = (query, key, value, *masks, distances, part.guides, places, *result)
    planned(rank_and_attend, tensors, query.device, terms, scale, softcap, config, workspace(), late=late)


def _with_rows(x: torch.Tensor) -> torch.Tensor:
    """The same, with the elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rank_and_attend(
    tensors: Tensors,
    device: torch.device,
    terms: Visibility,
    scale: float,
    softcap: float,
    config: S2OConfig,
    workspace: int,
) -> None:
    """What the kernels do in a call, with the tensors and terms of `attend_batch`, on a device."""
    query, key, value, *masks, distances, sample, places, output, lse, visited = tensors
    visibility = terms.with_tensors(*masks)
    config = visibility.effective_config(config, key.shape[2])
    arguments = Arguments(query, key, value, visibility, distances, scale, softcap, config, device, places)
    result = AttentionResult(output, lse, visited)
    if not arguments.geometry.ranked_segments:
        arguments = dataclasses.replace(arguments, config=config.without_ranking())
        attend(arguments, Lists.without_keys(arguments), range(arguments.geometry.segments), result)
        return
    guides = pool_guides(query.unflatten(1, (arguments.kv_heads, arguments.group_size)), config)
    scoring = scoring_of(arguments, guides, guides if sample is None else sample)
    for segments in runs(arguments, workspace):
        attend(arguments, rank(arguments, scoring, segments), segments, result)


def runs(arguments: Arguments, workspace: int) -> Iterator[range]:
    """Consecutive segments whose lists fit into so many bytes together; at least one segment each."""
    geometry, bits = arguments.geometry, arguments.batch_kv_heads * arguments.lists * bits_of_a_key(arguments)
    keys = 8 * workspace // bits

    def size(last: int) -> int:
        return (last + 1 - first) * round_up(geometry.longest_history(last))

    first = 0
    while first < geometry.segments:
        fitting = bisect.bisect(range(first + 1, geometry.segments), keys, key=size)
        yield range(first, first + 1 + fitting)
        first += 1 + fitting
