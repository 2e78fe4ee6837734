"""The keys whose flags are set, appended to one list per segment: the selection where the tail is dropped.

Where it is sampled, as by default, `ops.kernels.sample` selects.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .arguments import Arguments
from .helpers import FLAGS_PER_WORD, place_list, rows_at
from .launch import launch
from .lists import Lists
from .scoring import Scoring
from .variants import kernel


def select(arguments: Arguments, flags: torch.Tensor, scoring: Scoring, segments: range) -> Lists:
    """The keys whose flags [B, Hkv, lists, segments, capacity / 16] are set."""
    lists = Lists.to_fill(arguments, segments, flags, scoring)
    launch(
        select_kernel, (len(segments), lists.count.numel() // len(segments)),
        flags, arguments.rows, lists.index, lists.count,
        first_segment=segments.start, capacity=lists.capacity,
        **arguments.spans, PAGED=arguments.is_paged, BLOCK_N=256, num_warps=1, num_stages=2,
    )  # fmt: skip
    return lists


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
    return tl.load(flags + (column - begin) // FLAGS_PER_WORD, mask=column < end, other=0).to(tl.int32) & 0xFFFF


@kernel
def select_kernel(
    flags, rows, index, count,
    queries, keys, first_segment, ranked_segments, offset, window, near_keys, capacity,
    SEGMENT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PAGED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the index and the count of one of the `Lists`, by a prefix sum over its flags.

    Program (segment, last first; list of all batch entries and KV heads).
    """
    _, place, begin, end = place_list(
        first_segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW
    )
    flags += place * (capacity // FLAGS_PER_WORD)
    index += place * capacity
    listed = 0
    lane = tl.arange(0, BLOCK_N)
    # Few warps wait for what they load, so each block is loaded while the one before is at work.
    ahead = _load(flags, begin + lane * FLAGS_PER_WORD, begin, end)
    for start in range(begin, end, BLOCK_N * FLAGS_PER_WORD):
        column, word = start + lane * FLAGS_PER_WORD, ahead
        ahead = _load(flags, column + BLOCK_N * FLAGS_PER_WORD, begin, end)
        number = _count(word)
        position = listed + tl.cumsum(number, 0) - number
        for _ in range(tl.max(number, 0)):
            # The exponent of the lowest bit is its place.
            lowest = (word & -word).to(tl.float32).to(tl.int32, bitcast=True)
            chosen = rows_at(rows, column + ((lowest >> 23) - 127), word != 0, PAGED)
            tl.store(index + position, chosen, mask=word != 0)
            word &= word - 1
            position += 1
        listed += tl.sum(number, 0)
    tl.store(count + place, listed)
