"""The ranking of keys: guides score them, and those that importance and draws choose are listed."""

from __future__ import annotations

import torch

from ..rule.channels import picks_channels, project
from .arguments import Arguments
from .channels import select_channels
from .importance import Scoring, score
from .lists import Lists
from .normaliser import normalisers
from .quantise import Operands, operands_of_channels, ranking_operands
from .sample import sample
from .select import select


def scoring_of(arguments: Arguments, guides: torch.Tensor) -> Scoring:
    """Operands, normalisers and corrections for all segments, given guides [B, Hkv, guide heads, guides, D]."""
    key, channels, scale = arguments.key, arguments.config.ranking.channels, arguments.scale
    subset: Operands | None = None
    neglected: torch.Tensor | None
    if picks_channels(channels, key.shape[-1]):
        picked, neglected = select_channels(guides, key, arguments.visibility.key_padding, channels, scale)
        all_channels, subset = operands_of_channels(arguments, guides, picked)
    else:
        projected = project(guides, key, channels, scale, arguments.valid)
        neglected = None if projected.neglected is None else projected.neglected.float()
        all_channels = ranking_operands(arguments, guides, key)
        if neglected is not None:
            subset = ranking_operands(arguments, projected.guides, projected.key)
    return Scoring(all_channels, subset, normalisers(arguments, all_channels), neglected, arguments.distances)


def rank(arguments: Arguments, scoring: Scoring, segments: range) -> Lists:
    """The keys that the segments of a run visit beside their dense spans."""
    importance = score(arguments, scoring, segments)
    choose = sample if arguments.config.has_samples else select
    return choose(arguments, importance, scoring.guide_lse, segments)
