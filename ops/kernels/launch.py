"""Sparse attention by the Triton kernels: rank a run of segments, attend it, and go on to the next."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.library import triton_op, wrap_triton
from triton import next_power_of_2

from ..block_means import block_means
from ..config import S2OConfig
from ..geometry import BLOCK, Geometry
from ..guides import pool_guides
from ..ranking import sorted_history
from ..result import AttentionResult
from ..visibility import Visibility
from .attend import attend_kernel
from .normaliser import normaliser_kernel
from .select import select_kernel

WORKSPACE = 2**30
"""Bytes that the lists of one run of segments may take."""
_MAX_ROWS = 128
_LOG2_E = math.log2(math.e)


@dataclass
class Lists:
    """The keys to visit, one list per (batch entry, group, list, segment of the run), as the kernels lay them out."""

    index: torch.Tensor
    log_weight: torch.Tensor
    count: torch.Tensor
    skipped: torch.Tensor


@dataclass
class Call:
    """The tensors of a call and what its kernels share."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    geometry: Geometry
    scale: float
    softcap: float
    config: S2OConfig

    @property
    def groups(self) -> int:
        """KV heads."""
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.groups

    @property
    def lists(self) -> int:
        """Lists per KV head and segment."""
        return self.group if self.config.lists == "head" else 1

    @property
    def blocks(self) -> int:
        """Blocks of keys."""
        return -(-self.geometry.keys // BLOCK)

    @functools.cached_property
    def masks(self) -> tuple[torch.Tensor, ...]:
        """The tensors that mask: padding, documents of queries, documents of keys, mask; a stand-in where absent."""
        absent = self.key.new_empty(1, 1, dtype=torch.bool)
        rows = (self.visibility.key_padding, self.visibility.query_documents, self.visibility.key_documents)
        mask = self.visibility.mask
        return *(absent if x is None else x.contiguous() for x in rows), absent if mask is None else mask

    @property
    def mask_strides(self) -> tuple[int, ...]:
        """The strides of `masks`: of the first three over the batch, of the last in 4 dimensions."""
        *rows, mask = self.masks
        full = (*self.query.shape[:3], self.geometry.keys)
        strides = (0,) * 4 if self.visibility.mask is None else mask.expand(full).stride()
        return *(x.stride(0) for x in rows), *strides

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that all kernels share: of spans, masks and logits."""
        visibility = self.visibility
        return {
            "queries": self.geometry.queries,
            "keys": self.geometry.keys,
            "ranked_segments": self.geometry.ranked_segments,
            "offset": self.geometry.offset,
            "window": visibility.window or 0,
            "near_keys": self.geometry.near_keys,
            "groups": self.groups,
            "scale": self.scale * _LOG2_E,
            "softcap": self.softcap * _LOG2_E,
            "SEGMENT": self.config.segment,
            "CAUSAL": visibility.is_causal,
            "HAS_PADDING": visibility.key_padding is not None,
            "WINDOW": visibility.window is not None,
            "DOCUMENTS": visibility.query_documents is not None,
            "MASK": visibility.mask is not None,
            "SOFTCAP": self.softcap > 0,
            "D": self.key.shape[-1],
            "BLOCK_D": channels(self.key.shape[-1]),
            "PRECISION": "ieee" if self.query.dtype == torch.float32 else "tf32",
        }


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
    config = S2OConfig(**json.loads(settings))
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
    """Sparse attention without sinks; shapes as in `ops.reference`."""
    config = visibility.ranking(config)
    geometry = Geometry.of(query, key, visibility, config)
    result = AttentionResult.empty(query, value, config.tile)
    if 0 in (*query.shape[:3], geometry.keys):
        output, lse, visited = result
        return AttentionResult(torch.zeros_like(output), torch.full_like(lse, -math.inf), torch.zeros_like(visited))
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    call = Call(query, key, value, visibility, geometry, scale, softcap, config)
    guides = pool_guides(query.unflatten(1, (call.groups, call.group)), config)
    means: tuple[torch.Tensor, ...] = (query.new_empty(1), query.new_empty(1))
    if config.has_means:
        valid = None if visibility.key_padding is None else visibility.key_padding[:, None]
        means = tuple(block_means(x, valid).to(x.dtype) for x in (key, value))
    for segments in runs(call):
        lists = sort(call, guides, segments) if config.stop == "gain" else select(call, guides, segments)
        attend(call, lists, means, segments, result)
    return result


def runs(call: Call) -> list[range]:
    """Consecutive segments whose lists fit into the workspace together."""
    per_key = call.query.shape[0] * call.groups * call.lists * 4
    if call.config.stop == "gain":
        per_key *= 8  # Scores, weights and the sort's own index.
    if call.config.has_samples:
        per_key *= 2
    found, first = [], 0
    while first < call.geometry.segments:
        end = first + 1
        while end < call.geometry.segments and (end + 1 - first) * per_key * capacity(call, end) <= WORKSPACE:
            end += 1
        found.append(range(first, end))
        first = end
    return found


def capacity(call: Call, segment: int) -> int:
    """The longest list of the segments up to `segment`."""
    if not call.geometry.is_causal or call.config.stop == "gain":
        return call.geometry.keys
    longest = max(1, call.geometry.span(min(segment, call.geometry.ranked_segments - 1)).low)
    return longest if call.geometry.window is None else min(longest, call.geometry.window + BLOCK)


def sort(call: Call, guides: torch.Tensor, segments: range) -> Lists:
    """The whole history, by importance."""
    per_segment = call.config.segment // call.config.pool
    part = guides[:, :, :, segments.start * per_segment : segments.stop * per_segment]
    index, count = sorted_history(
        part, call.key, call.visibility, segments, call.geometry, call.scale, call.softcap, call.config
    )
    return Lists(index.contiguous(), call.key.new_empty(1), count.contiguous(), count)


def select(call: Call, guides: torch.Tensor, segments: range) -> Lists:
    """The keys that `importance` and draws choose, by two kernels."""
    config, key = call.config, call.key
    batch, guide_heads, per_head = guides.shape[0], guides.shape[2], guides.shape[3]
    longest = capacity(call, segments[-1])
    lists = batch * call.groups * call.lists * len(segments)
    index = key.new_empty(lists, longest, dtype=torch.int32)
    log_weight = key.new_empty(index.shape if config.has_samples else 1, dtype=torch.float32)
    count = key.new_empty(lists, dtype=torch.int32)
    skipped = key.new_empty(lists, call.blocks, dtype=torch.int32)
    lse = key.new_empty(guides.shape[:-1], dtype=torch.float32)
    per_segment = config.segment // config.pool
    shared = {
        **call.shared,
        "guides_per_head": per_head,
        "first_segment": segments.start,
        "first_keys": config.first_keys,
        "POOL": config.pool,
        "GUIDE_HEADS": guide_heads,
    }
    rows = block_rows(guide_heads * per_segment)
    wrap_triton(normaliser_kernel)[
        (len(segments), -(-guide_heads * per_segment // rows), batch * call.groups)
    ](
        guides, key, *call.masks, lse,
        *guides.stride()[:4], *key.stride()[:3], *call.mask_strides,
        sample=config.sample,
        log2_sample=math.log2(config.sample),
        **shared,
        BLOCK_M=rows, BLOCK_N=block_keys(call), num_warps=warps(rows), num_stages=2,
    )  # fmt: skip
    rows = block_rows(guide_heads // call.lists * per_segment)
    wrap_triton(select_kernel)[(len(segments), call.lists, batch * call.groups)](
        guides, lse, key, *call.masks, index, log_weight, count, skipped,
        *guides.stride()[:4], *key.stride()[:3], *call.mask_strides,
        capacity=longest,
        blocks=call.blocks,
        log2_threshold=math.log2(config.threshold) if config.threshold else -1e38,
        log2_max_weight=math.log2(config.max_weight) if config.max_weight else 0.0,
        mean_weight=config.mean_weight,
        HAS_MAX=config.max_weight > 0,
        HAS_MEAN=config.mean_weight > 0,
        SAMPLED=config.has_samples,
        LISTS=call.lists,
        **shared,
        BLOCK_M=rows, num_warps=warps(rows), num_stages=2,
    )  # fmt: skip
    return Lists(index, log_weight, count, skipped)


def attend(call: Call, lists: Lists, means: tuple[torch.Tensor, ...], segments: range, result: AttentionResult) -> None:
    """Attend the tiles of a run of segments, and write their part of the result."""
    config, geometry = call.config, call.geometry
    heads = max(1, min(call.group // call.lists, _MAX_ROWS // config.tile))
    parts = call.lists * -(-call.group // call.lists // heads)
    rows = block_rows(heads * config.tile, most=1024)
    per_segment = config.segment // config.tile
    tiles = min(segments.stop * per_segment, geometry.tiles) - segments.start * per_segment
    wrap_triton(attend_kernel)[(tiles, parts, call.query.shape[0] * call.groups)](
        call.query, call.key, call.value, *call.masks,
        lists.index, lists.log_weight, lists.count, lists.skipped, *means, *result,
        *call.query.stride()[:3], *call.key.stride()[:3], *call.value.stride()[:3], *call.mask_strides,
        *result.output.stride()[:3],
        **call.shared,
        first_segment=segments.start,
        segments=len(segments),
        tiles=geometry.tiles,
        capacity=lists.index.shape[-1],
        blocks=call.blocks,
        threshold=config.threshold,
        TILE=config.tile, GROUP=call.group, LISTS=call.lists, HEADS=heads,
        HAS_MEANS=config.has_means, SAMPLED=config.has_samples,
        STOP_BY_GAIN=config.stop == "gain", CHUNK=config.chunk,
        DV=call.value.shape[-1], BLOCK_DV=channels(call.value.shape[-1]),
        BLOCK_M=rows, BLOCK_N=block_keys(call), num_warps=warps(rows), num_stages=2,
    )  # fmt: skip


def channels(count: int) -> int:
    """Channels as the kernels hold them."""
    return max(16, next_power_of_2(count))


def block_rows(rows: int, most: int = _MAX_ROWS) -> int:
    """Rows as the kernels hold them."""
    return min(most, max(16, next_power_of_2(rows)))


def block_keys(call: Call) -> int:
    """Keys that a kernel attends at once: fewer where rows of keys and values are wide."""
    wide = max(call.key.shape[-1], call.value.shape[-1]) * call.key.element_size()
    return 64 if wide <= 256 else 32 if wide <= 512 else 16


def warps(rows: int) -> int:
    """Warps for a block of rows."""
    return 8 if rows >= 128 else 4
