"""The ranking of keys: guides score them, and those that importance and draws choose are listed."""

from __future__ import annotations

from typing import TypeAlias

import torch

from ..rule.channels import project
from .arguments import Arguments
from .channels import ChannelSubset, key_covariance, sample_moments, select_channels
from .fold import fold
from .importance import score
from .lists import Lists
from .merge import MergedGuides, merge
from .normaliser import normalisers
from .quantise import (
    DIGITS,
    Operands,
    Units,
    operands_of_channels,
    picked_channels,
    quantise_keys,
    ranking_operands,
    ranks_copies,
)
from .sample import sample
from .scoring import Scoring
from .select import select

Corrected: TypeAlias = tuple[Operands, Operands | None, torch.Tensor | None]
"""Operands in all channels, in fewer, and what these neglect: fields of `Scoring`."""


def scoring_of(arguments: Arguments, query: torch.Tensor, sample: torch.Tensor) -> Scoring:
    """Operands, normalisers and corrections for all segments, given queries or pooled guides [B, Hkv, G or 1, n, D].

    Channels are chosen by the `sample` of them, of any n.
    """
    key, scale, ranking = arguments.key, arguments.scale, arguments.config.ranking
    padding, places = arguments.visibility.key_padding, arguments.places
    few, is_folded = picked_channels(arguments)
    moments = sample_moments(sample, key, padding, places) if few is not None or ranking.merges else None
    picked = select_channels(moments, key, padding, few, scale) if moments and few is not None else None
    if not (moments and ranking.merges):
        merged, operands = None, _operands(arguments, query, sample, picked, None)
    else:
        covariance = key_covariance(moments, key, padding, scale)
        merged, operands = _merged(arguments, covariance, sample, picked, is_folded)
    all_channels, subset, neglected = operands
    guide_lse = normalisers(arguments, all_channels, merged)
    if is_folded and merged is not None and subset is not None and neglected is not None:
        fold(arguments, subset, merged, guide_lse, neglected)
    return Scoring(all_channels, subset, guide_lse, neglected, arguments.distances, merged)


def _merged(
    arguments: Arguments, covariance: torch.Tensor, sample: torch.Tensor, picked: ChannelSubset | None, is_folded: bool
) -> tuple[MergedGuides, Corrected]:
    """Merged queries, straight to float8 where that can be, and their `_operands`."""
    channels, neglected = picked or (None, None)
    if ranks_copies(arguments.query, arguments.config.ranking.channels, arguments.softcap, arguments.device):
        key, places = arguments.key, arguments.places
        units, digits = Units.of(key, places), DIGITS.value if is_folded else 0
        merged = merge(arguments, covariance, units, channels, digits)
        keys = quantise_keys(key, units, channels, places, digits)
        subset = None if picked is None else Operands(merged.subset, keys[1], units.ranges, is_folded)
        return merged, (Operands(merged.rows, keys[0], units.ranges), subset, neglected)
    merged = merge(arguments, covariance)
    return merged, _operands(arguments, merged.rows, sample, picked, merged.counts)


def _operands(
    arguments: Arguments,
    guides: torch.Tensor,
    sample: torch.Tensor,
    picked: ChannelSubset | None,
    count: torch.Tensor | None,
) -> Corrected:
    """The operands of guides [B, Hkv, G or 1, n, D], those in fewer channels, and `Scoring.neglected`.

    Of guides that are merged queries, `count` [B, Hkv, lists, segments] says how many each segment has.
    """
    key, channels = arguments.key, arguments.config.ranking.channels
    if picked is not None:
        return *operands_of_channels(arguments, guides, picked.channels, count), picked.neglected
    projected = project(sample, key, channels, arguments.scale, arguments.valid, guides)
    all_channels = ranking_operands(arguments, guides, key, count)
    if projected.neglected is None:
        return all_channels, None, None
    subset = ranking_operands(arguments, projected.guides, projected.key, count)
    return all_channels, subset, projected.neglected.float()


def rank(arguments: Arguments, scoring: Scoring, segments: range) -> Lists:
    """The keys that the segments of a run visit beside their dense spans."""
    importance = score(arguments, scoring, segments)
    choose = sample if arguments.config.has_samples else select
    return choose(arguments, importance, scoring, segments)
