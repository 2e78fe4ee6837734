"""Sampling of the tail: which keys below the threshold are visited, and what they then weigh.

A key of importance p below the threshold t is visited with probability p / t and weighs t / p, so that softmax sums
stay unbiased (Horvitz and Thompson, 1952). If the importance bounds a row's share of mass in the key, the variance of
that row's mass is at most t times the mass of its tail. Where keys are ranked by pooled queries or in few channels, a
row may give a key far more than its importance: weighed by t / p it could outweigh all the rest of the row. Such a key
adds at most `MAX_WEIGHT_FACTOR` times t of the row's mass, as its guide estimates it, or its own mass if that is more;
a little bias for much variance, as in truncated importance sampling (Ionides, 2008). Draws are a function of position
and segment alone, so that results repeat.
"""

from __future__ import annotations

import math

import torch

KEY_STEP = 2654435769
"""2^32 over the golden ratio: along the keys, draws are evenly spread however few are taken (a Weyl sequence)."""
SEGMENT_STEP = 1779033703
"""2^32 times the fraction of the square root of 2: spreads the draws of a key over segments in the same way."""

MAX_WEIGHT_FACTOR = 4.0
"""Thresholds of a row's mass that a sampled key may add beyond its own."""


def draws(keys: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Numbers between 0 and 1, float32, for key positions and segment indices (integers, broadcast together)."""
    of_keys, of_segments = (keys.long() * KEY_STEP).int(), (segments.long() * SEGMENT_STEP).int()
    bits = (of_keys + of_segments).bitwise_right_shift_(9).bitwise_and_(2**23 - 1)
    return bits.float().add_(0.5).mul_(2.0**-23)


def most_logits(lse: torch.Tensor, threshold: float) -> torch.Tensor:
    """The limit to which its weight may raise a sampled key's logit, given the log-sum-exps of the rows' guides.

    Infinite where a log-sum-exp is NaN or infinite.
    """
    return (lse + math.log(MAX_WEIGHT_FACTOR * threshold)).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
