"""The keys whose flags are set, appended to one list per segment."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .helpers import FLAGS, KEY_BLOCK, MEANS_AT_ONCE, place_list, round_up

WORDS = tl.constexpr(KEY_BLOCK // FLAGS)
"""Words of flags of a block of keys."""


@triton.jit
def _count(word):
    """How many of the 16 lowest bits are set, the others being 0 (Warren, Hacker's Delight, section 5-1)."""
    word -= word >> 1 & 0x5555
    word = (word & 0x3333) + (word >> 2 & 0x3333)
    word = word + (word >> 4) & 0x0F0F
    return word + (word >> 8) & 0x1F


@triton.jit
def _load(flags, column, begin, end):
    """The flags of the keys from `column` on; none past the history."""
    return tl.load(flags + (column - begin) // FLAGS, mask=column < end, other=0).to(tl.int32) & 0xFFFF


@triton.jit
def select_kernel(
    flags,
    index,
    count,
    skipped,
    queries,
    keys,
    first_segment,
    ranked_segments,
    offset,
    window,
    near_keys,
    capacity,
    skipped_stride,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write one list: its keys, how many, and with HAS_MEANS the log2 of how many keys of each block are not in it.

    Flags as `importance_kernel` leaves them, index [lists, capacity], count [lists], skipped [lists, blocks] float32,
    whose rows are as long as a multiple of `MEANS_AT_ONCE`: -inf follows the history up to a multiple.
    Program (segment, list of all batch entries and groups).
    """
    _, place, begin, end = place_list(
        first_segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW
    )
    lists = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64)
    left = flags + (lists + place) * (capacity // FLAGS)
    flags += place * (capacity // FLAGS)
    index += place * capacity
    listed = 0
    lane = tl.arange(0, BLOCK_N)
    # Few warps wait for what they load, so each block is loaded while the one before is at work.
    ahead = _load(flags, begin + lane * FLAGS, begin, end)
    stop = round_up(end, MEANS_AT_ONCE * KEY_BLOCK) if HAS_MEANS else end
    skipped += place * skipped_stride
    for start in range(begin, stop, BLOCK_N * FLAGS):
        column, word = start + lane * FLAGS, ahead
        ahead = _load(flags, column + BLOCK_N * FLAGS, begin, end)
        number = _count(word)
        position = listed + tl.cumsum(number, 0) - number
        for _ in range(tl.max(number, 0)):
            # The exponent of the lowest bit is its place.
            lowest = (word & -word).to(tl.float32).to(tl.int32, bitcast=True)
            tl.store(index + position, column + ((lowest >> 23) - 127), mask=word != 0)
            word &= word - 1
            position += 1
        listed += tl.sum(number, 0)
        if HAS_MEANS:
            others = _count(_load(left, column, begin, end)) if HAS_LEFT else tl.where(column < end, FLAGS - number, 0)
            others = tl.sum(tl.reshape(others, [BLOCK_N // WORDS, WORDS]), 1).to(tl.float32)
            block = start // KEY_BLOCK + tl.arange(0, BLOCK_N // WORDS)
            tl.store(skipped + block, tl.log2(others))
    tl.store(count + place, listed)
