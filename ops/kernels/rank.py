"""The lists of keys that a run of segments visits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

from ..projection import picks_channels, project
from .call import Call, channels
from .helpers import FLAGS
from .importance import importance_kernel
from .normaliser import normaliser_kernel
from .quantise import Operands, operands_of_channels, ranking_operands, sums_in_half
from .sample import sample_kernel
from .select import select_kernel
from .strongest import strongest_channels
from .tiling import importance_tiling, normaliser_tiling

_SPAN = ("queries", "keys", "ranked_segments", "offset", "window", "near_keys", "SEGMENT", "CAUSAL", "WINDOW")
CHUNK = 4096
"""Keys that one program scores."""


@dataclass
class Lists:
    """The keys to visit, one list per (batch entry, group, list, segment of the run), as the kernels lay them out."""

    index: torch.Tensor
    count: torch.Tensor
    weights: torch.Tensor
    guide_lse: torch.Tensor

    @classmethod
    def empty(cls, call: Call) -> Lists:
        """Lists without keys, of all segments."""
        lists = call.query.shape[0] * call.groups * call.lists * call.geometry.segments
        count = call.key.new_zeros(lists, dtype=torch.int32)
        absent = call.key.new_empty(1)
        return cls(count, count, absent, absent)


class Scoring(NamedTuple):
    """What keys are scored by: in all channels, or in `few`, which `Ranking.neglected` chooses for each KV group."""

    operands: Operands
    is_few: bool


class Ranking(NamedTuple):
    """What keys are scored by, and the guides' log-sum-exps (`normalisers`), from all channels.

    `neglected` [B, Hkv] float32 is `Projected.neglected`, None where all groups are scored in all channels; `distances`
    [B, Hkv, Lk] weigh shares of mass, None for none.
    """

    scorings: tuple[Scoring, ...]
    lse: torch.Tensor
    neglected: torch.Tensor | None
    distances: torch.Tensor | None

    @classmethod
    def of(cls, call: Call, guides: torch.Tensor) -> Ranking:
        """Of guides [B, Hkv, guide heads, guides, D]."""
        wanted, key, softcap = call.config.channels, call.key, call.softcap
        if picks_channels(wanted, key.shape[-1]):
            channels, neglected = strongest_channels(guides, key, call.visibility.key_padding, wanted, call.scale)
            whole, few = operands_of_channels(guides, key, softcap, channels)
        else:
            projected = project(guides, key, wanted, call.scale, call.valid)
            whole = ranking_operands(guides, key, softcap)
            if projected.neglected is None:
                return cls((Scoring(whole, False),), normalisers(call, whole), None, call.distances())
            few, neglected = ranking_operands(projected.guides, projected.key, softcap), projected.neglected.float()
        return cls((Scoring(few, True), Scoring(whole, False)), normalisers(call, whole), neglected, call.distances())


def select(call: Call, ranking: Ranking, segments: range) -> Lists:
    """The keys that their importance and draws choose."""
    config, capacity = call.config, call.capacity(segments[-1])
    importance = score(call, ranking, segments)
    lists = call.query.shape[0] * call.groups * call.lists * len(segments)
    index = torch.empty(lists, capacity, dtype=torch.int32, device=call.key.device)
    count = index.new_empty(lists)
    grid = (len(segments), lists // len(segments))
    spans = {name: call.shared[name] for name in _SPAN} | {"first_segment": segments.start, "capacity": capacity}
    if config.has_samples:
        wrap_triton(sample_kernel)[grid](importance, index, count, **spans, BLOCK_N=1024, num_warps=4, num_stages=2)
    else:
        wrap_triton(select_kernel)[grid](
            importance, index, count, **spans, BLOCK_N=256, num_warps=1, num_stages=2
        )  # fmt: skip
    return Lists(index, count, importance, ranking.lse)


def normalisers(call: Call, operands: Operands) -> torch.Tensor:
    """The log-sum-exp of each guide [B, Hkv, guide heads, guides], in units of log 2.

    Of all segments at once: those of a run are too few to fill a GPU.
    """
    config, guides, key, segments = call.config, operands.guides, operands.key, range(call.geometry.segments)
    lse = torch.empty(guides.shape[:-1], dtype=torch.float32, device=guides.device)
    total = guides.shape[2] * (config.segment // config.pool)
    tiling = normaliser_tiling(key.shape[-1], key.element_size(), total)
    together = tiling.segments(total)
    wrap_triton(normaliser_kernel)[
        (-(-len(segments) // together), -(-total * together // tiling.rows), call.query.shape[0] * call.groups)
    ](
        guides, operands.ranges, key, *call.masks, lse,
        *guides.stride()[:4], *key.stride()[:3], *call.mask_strides,
        sample=config.sample,
        log2_sample=math.log2(config.sample),
        SEGMENTS=together,
        **call.shared, **guide_settings(call, operands, segments), **tiling.arguments,
    )  # fmt: skip
    return lse


def score(call: Call, ranking: Ranking, segments: range) -> torch.Tensor:
    """The importance of the keys of each list's history [lists, capacity], in steps of the threshold; or flags.

    Where keys are not drawn, flags tell which of them are listed.
    """
    capacity = call.capacity(segments[-1])
    lists = call.query.shape[0] * call.groups * call.lists * len(segments)
    if call.config.has_samples:
        importance = torch.empty(lists, capacity, dtype=call.importance_dtype, device=call.key.device)
    else:
        importance = torch.empty(lists, capacity // FLAGS, dtype=torch.int16, device=call.key.device)
    for scoring in ranking.scorings:
        score_groups(call, scoring, ranking, segments, importance)
    return importance


def score_groups(call: Call, scoring: Scoring, ranking: Ranking, segments: range, importance: torch.Tensor) -> None:
    """Write the importance of the keys of some KV groups."""
    config, operands, distances, neglected = call.config, scoring.operands, ranking.distances, ranking.neglected
    guides, key = operands.guides, operands.key
    capacity = call.capacity(segments[-1])
    total = guides.shape[2] // call.lists * (config.segment // config.pool)
    half = sums_in_half(operands, call.takes_mean)
    tiling = importance_tiling(key.shape[-1], key.element_size(), total, half)
    together = tiling.guides.segments(total)
    programs = -(-len(segments) // together) * -(-(capacity + config.segment * together) // CHUNK)
    wrap_triton(importance_kernel)[(programs, call.lists, call.query.shape[0] * call.groups)](
        guides, operands.ranges, ranking.lse, key, ranking.lse if distances is None else distances,
        ranking.lse if neglected is None else neglected, *call.masks, importance,
        *guides.stride()[:4], *key.stride()[:3], *call.mask_strides,
        capacity=capacity,
        chunk=CHUNK,
        threshold=config.threshold,
        HALF=half,
        TAKES_MEAN=call.takes_mean, SAMPLED=config.has_samples,
        MEASURES_OUTPUT=distances is not None, CHOOSES=neglected is not None, FEW=scoring.is_few,
        LISTS=call.lists, SEGMENTS=together,
        **call.shared, **guide_settings(call, operands, segments), **tiling.arguments,
    )  # fmt: skip


def guide_settings(call: Call, operands: Operands, segments: range) -> dict[str, Any]:
    """The arguments that the kernels of guides share."""
    return {
        "guides_per_head": operands.guides.shape[3],
        "first_segment": segments.start,
        "segments": len(segments),
        "POOL": call.config.pool,
        "GUIDE_HEADS": operands.guides.shape[2],
        "D": operands.key.shape[-1],
        "BLOCK_D": channels(operands.key.shape[-1]),
        "QUANTISED": operands.are_quantised,
    }
