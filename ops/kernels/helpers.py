"""What the kernels share: spans, loads of rows by index, and the online softmax. Logits are in units of log 2."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .. import sampling

LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1e38)
KEY_BLOCK = tl.constexpr(64)
KEY_STEP = tl.constexpr(sampling.KEY_STEP)
SEGMENT_STEP = tl.constexpr(sampling.SEGMENT_STEP)


@triton.jit
def float32(number):
    """A floating argument as float32: Inductor passes them as float64."""
    return tl.full([], number, tl.float32)


@triton.jit
def clip(key, keys):
    return tl.maximum(0, tl.minimum(key, keys))


@triton.jit
def dense_span(segment, queries, keys, offset, near_keys, ranked_segments, SEGMENT: tl.constexpr, CAUSAL: tl.constexpr):
    """`Geometry.span`: the keys [low, high) that a segment attends densely."""
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, queries)
    low = clip(first + offset - near_keys, keys) // KEY_BLOCK * KEY_BLOCK
    high = clip((clip(end + offset + near_keys, keys) + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK, keys)
    if segment >= ranked_segments:
        low = 0
        high = keys
    if CAUSAL:
        high = clip(end + offset, keys)
    return low, tl.maximum(low, high)


@triton.jit
def draws(keys, segment):
    """`sampling.draws`: numbers between 0 and 1 for key positions [N] and a segment."""
    bits = keys.to(tl.uint32) * KEY_STEP + (tl.zeros_like(keys) + segment).to(tl.uint32) * SEGMENT_STEP
    return ((bits >> 9).to(tl.float32) + 0.5) * (2.0**-23)


@triton.jit
def load_rows(base, rows, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows [N, BLOCK_D] of a matrix, zeros where not `inside` and past channel D."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(pointers, mask=inside[:, None] & (channels < D)[None, :], other=0.0)


@triton.jit
def load_padding(padding, keys, inside, HAS_PADDING: tl.constexpr):
    """`inside`, without the keys that are padding."""
    if HAS_PADDING:
        inside = inside & (tl.load(padding + keys, mask=inside, other=0) != 0)
    return inside


@triton.jit
def finite_or_zero(maximum):
    """The origin of exponents: the running maximum, or 0 before the first key."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)
