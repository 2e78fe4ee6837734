"""What keys are scored by."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .merge import MergedGuides
from .quantise import Operands


class Scoring(NamedTuple):
    """The operands of the scores of a call's keys, and their corrections.

    Attributes:
        all_channels: Guides and keys.
        subset: The same in fewer channels (`rule.channels`); None where all KV heads are scored in all channels.
        guide_lse: [B, Hkv, guide heads, guides] float32, the guides' log-sum-exps from all channels, in units of log 2.
        neglected: [B, Hkv] float32, `Projected.neglected`, by which each KV head chooses; None without a subset.
        distances: [B, Hkv, Lk] float32, which shares of mass are multiplied by; None for none.
        merged: The guides, where they are merged queries; None where they are not.
    """

    all_channels: Operands
    subset: Operands | None
    guide_lse: torch.Tensor
    neglected: torch.Tensor | None
    distances: torch.Tensor | None
    merged: MergedGuides | None
