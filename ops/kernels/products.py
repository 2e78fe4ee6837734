"""Products of keys, as rows, and the guides of several segments, as columns: where these stand, and their maxima."""

from __future__ import annotations

import triton
import triton.language as tl

from .helpers import FIRST_KEYS, FLAGS_PER_WORD, load_padding

LANES = tl.constexpr(4)
"""Threads that share a row of a product."""


@triton.jit
def larger(one, other):
    """The larger, or NaN where either is."""
    return tl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def place_rows(row, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr):
    """The segment and the guide of each row of a part, which has as many guides of each of SEGMENTS segments.

    Of each 8 columns of a product a thread holds the pair 2t and 2t + 1, t < 4. Pairs of guides of BESIDE segments
    stand side by side: with 4, a thread holds the guides of its segments, and reduces them without asking others.
    """
    guides: tl.constexpr = row.shape[0] // SEGMENTS
    beside: tl.constexpr = SEGMENTS if SEGMENTS < BESIDE else BESIDE
    together: tl.constexpr = guides if guides < 2 else 2
    block, lane = row // (beside * together), row // together % beside
    pairs: tl.constexpr = guides // together
    return block // pairs * beside + lane, block % pairs * together + row % together


@triton.jit
def by_segment(products, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr):
    """The columns of the product of a part [N, SEGMENTS * guides], by segment and guide [N, SEGMENTS, guides]."""
    guides: tl.constexpr = products.shape[1] // SEGMENTS
    beside: tl.constexpr = SEGMENTS if SEGMENTS < BESIDE else BESIDE
    together: tl.constexpr = guides if guides < 2 else 2
    shape: tl.constexpr = [products.shape[0], SEGMENTS // beside, guides // together, beside, together]
    products = tl.reshape(products, shape)
    return tl.reshape(tl.permute(products, (0, 1, 3, 2, 4)), [products.shape[0], SEGMENTS, guides])


@triton.jit
def pack_flags(flags):
    """Flags [N, SEGMENTS] as bits of int16 [N / 16, SEGMENTS], the first of each 16 low.

    A warp holds 16 rows of a product, so bits stay within it.
    """
    bit = 1 << tl.arange(0, flags.shape[0]) % FLAGS_PER_WORD
    bits = tl.where(flags, bit[:, None], 0)
    return tl.sum(tl.reshape(bits, [flags.shape[0] // FLAGS_PER_WORD, FLAGS_PER_WORD, flags.shape[1]]), 1).to(tl.int16)


@triton.jit
def raise_largest(largest, of_segments, origin, SEGMENTS: tl.constexpr, BESIDE: tl.constexpr, HALF: tl.constexpr):
    """`largest` [N, SEGMENTS], or the largest of the logits `of_segments` [N, SEGMENTS, guides]; NaN if one is.

    `origin` is what was added to the logits of each guide; not read with HALF.
    """
    if HALF:
        largest = larger(largest, tl.reduce(of_segments, 2, larger))
    else:
        # A maximum over guides does not propagate the NaN of one of them.
        blind = by_segment((origin != origin).to(tl.int32)[None, :], SEGMENTS, BESIDE)
        blind = tl.where(tl.max(blind, 2) > 0, float("inf"), float("-inf"))
        largest = larger(larger(largest, blind), tl.max(of_segments, 2))
    return largest


@triton.jit
def decided(
    score, column, keys, low, high, distances, padding,
    MEASURES_OUTPUT: tl.constexpr, HAS_PADDING: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """The scores of keys [N, SEGMENTS] where they decide: times distances, infinite for the first keys, -1 for none."""
    if MEASURES_OUTPUT:
        score *= tl.load(distances + column, mask=column < keys, other=1.0)[:, None]
    score += tl.where(column < FIRST_KEYS, float("inf"), 0.0)[:, None]
    if HAS_PADDING:
        score = tl.where(load_padding(padding, column, column < keys, True)[:, None], score, -1.0)
    if not CAUSAL:
        score = tl.where((column[:, None] < low[None, :]) | (column[:, None] >= high[None, :]), score, -1.0)
    return score
