"""Sparse attention by the Triton kernels: rank a run of segments, attend it, and go on to the next."""

from __future__ import annotations

import bisect
import functools
import math

import torch
from torch.library import triton_op, wrap_triton

from ..config import S2OConfig
from ..geometry import Geometry, round_up
from ..result import AttentionResult
from ..sampling import MOST
from ..visibility import Visibility
from .attend import attend_kernel
from .call import Call, channels
from .guides import pool_guides
from .rank import Lists, Ranking, select
from .tiling import MAX_ROWS, attend_tiling, shared_memory

MOST_PROGRAMS = 2**16 - 1
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

    Of rules that `ops.choice.has_kernels`.
    """
    config = visibility.ranking(config)
    result = AttentionResult.empty(query, value, config.tile)
    batch, heads = query.shape[:2]
    at_once = max(1, MOST_PROGRAMS // (heads if config.lists == "head" else key.shape[1]))
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
    """Fill the `result` of so many batch entries as one launch can have programs for."""
    geometry = Geometry.of(query, key, visibility, config)
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if not geometry.ranked_segments:
        call = Call(query, key, value, visibility, geometry, scale, softcap, config.without_ranking())
        attend(call, Lists.empty(call), range(geometry.segments), result)
        return
    call = Call(query, key, value, visibility, geometry, scale, softcap, config)
    guides = pool_guides(query.unflatten(1, (call.groups, call.group)), config)
    ranking = Ranking.of(call, guides)
    for segments in runs(call):
        attend(call, select(call, ranking, segments), segments, result)


def runs(call: Call) -> tuple[range, ...]:
    """Consecutive segments whose lists fit into the workspace together."""
    bits = 32 + (8 * call.importance_dtype.itemsize if call.config.has_samples else 1)
    return _runs(call.geometry, 8 * call.config.workspace // (call.query.shape[0] * call.groups * call.lists * bits))


@functools.lru_cache(maxsize=2**12)
def _runs(geometry: Geometry, room: int) -> tuple[range, ...]:
    """`runs`, of one list for each segment and so many keys in all; at least one segment each."""

    def size(last: int) -> int:
        return (last + 1 - first) * round_up(geometry.longest_history(last))

    first, end = 0, geometry.segments
    found = []
    while first < end:
        fitting = bisect.bisect(range(first + 1, end), room, key=size)
        found.append(range(first, first + 1 + fitting))
        first += 1 + fitting
    return tuple(found)


def attend(call: Call, lists: Lists, segments: range, result: AttentionResult) -> None:
    """Attend the tiles of a run of segments, and write their part of the result."""
    config, geometry = call.config, call.geometry
    heads = max(1, min(call.group // call.lists, MAX_ROWS // config.tile))
    parts = call.lists * -(-call.group // call.lists // heads)
    widest = max(call.key.shape[-1], call.value.shape[-1])
    # Every row has a maximum after the keys that need a mask.
    is_fixed = not call.visibility.varies
    shared = shared_memory(call.key.device)
    tiling = attend_tiling(widest, call.key.element_size(), heads * config.tile, is_fixed, shared)
    per_segment = config.segment // config.tile
    tiles = min(segments.stop * per_segment, geometry.tiles) - segments.start * per_segment
    wrap_triton(attend_kernel)[(tiles, parts, call.query.shape[0] * call.groups)](
        call.query, call.key, call.value, *call.masks,
        lists.index, lists.count, lists.weights, lists.guide_lse, *result,
        *call.query.stride()[:3], *call.key.stride()[:2], *call.value.stride()[:2], *call.mask_strides,
        *result.output.stride()[:3],
        **call.shared,
        KEY_STRIDE=call.key.stride(2), VALUE_STRIDE=call.value.stride(2),
        D=call.key.shape[-1], BLOCK_D=channels(call.key.shape[-1]),
        first_segment=segments.start,
        segments=len(segments),
        tiles=geometry.tiles,
        capacity=lists.index.shape[-1],
        log2_most=math.log2(MOST * max(config.threshold, 1e-30)),
        guides_per_head=-(-geometry.queries // config.pool),
        POOL=config.pool, GUIDE_HEADS=call.group if config.guides == "head" else 1,
        FIXED=is_fixed,
        BOUNDED=config.bounds_weights(call.key.shape[-1]),
        TILE=config.tile, GROUP=call.group, LISTS=call.lists, HEADS=heads,
        SAMPLED=config.has_samples,
        DV=call.value.shape[-1], BLOCK_DV=channels(call.value.shape[-1]),
        **tiling.arguments,
    )  # fmt: skip
