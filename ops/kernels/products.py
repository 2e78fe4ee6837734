"""Products of keys, as rows, and the guides of several segments, as columns: where these stand, and their maxima."""

from __future__ import annotations

import triton
import triton.language as tl

from .helpers import FLAGS_PER_WORD

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
