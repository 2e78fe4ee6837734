"""The ranking of keys: guides score them, and those that importance and draws choose are listed."""

from __future__ import annotations

import torch

from ..rule.channels import picks_channels, project
from .arguments import Arguments
from .channels import key_covariance, sample_moments, select_channels
from .importance import score
from .lists import Lists
from .merge import merge
from .normaliser import normalisers
from .quantise import Operands, operands_of_channels, ranking_operands
from .sample import sample
from .scoring import Scoring
from .select import select


def scoring_of(arguments: Arguments, query: torch.Tensor, sample: torch.Tensor) -> Scoring:
    """Operands, normalisers and corrections for all segments, given queries or pooled guides [B, Hkv, G or 1, n, D].

    Channels are chosen by the `sample` of them, of any n.
    """
    key, channels, scale = arguments.key, arguments.config.ranking.channels, arguments.scale
    few, merges = channels if picks_channels(channels, key.shape[-1]) else None, arguments.config.ranking.merges
    padding = arguments.visibility.key_padding
    moments = sample_moments(sample, key, padding) if few is not None or merges else None
    merged = merge(arguments, key_covariance(moments, key, padding, scale)) if moments and merges else None
    guides, count = (query, None) if merged is None else (merged.rows, merged.counts)
    subset: Operands | None = None
    neglected: torch.Tensor | None
    if moments and few is not None:
        picked, neglected = select_channels(moments, key, padding, few, scale)
        all_channels, subset = operands_of_channels(arguments, guides, picked, count)
    else:
        projected = project(sample, key, channels, scale, arguments.valid, guides)
        neglected = None if projected.neglected is None else projected.neglected.float()
        all_channels = ranking_operands(arguments, guides, key, count)
        if neglected is not None:
            subset = ranking_operands(arguments, projected.guides, projected.key, count)
    guide_lse = normalisers(arguments, all_channels, merged)
    return Scoring(all_channels, subset, guide_lse, neglected, arguments.distances, merged)


def rank(arguments: Arguments, scoring: Scoring, segments: range) -> Lists:
    """The keys that the segments of a run visit beside their dense spans."""
    importance = score(arguments, scoring, segments)
    choose = sample if arguments.config.has_samples else select
    return choose(arguments, importance, scoring, segments)
