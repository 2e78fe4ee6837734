"""The keys whose importance reaches the threshold or their draw below it, appended to one list per segment."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .helpers import KEY_BLOCK, draws, float32, span


@triton.jit
def select_kernel(
    importance,
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
    blocks,
    log2_threshold,
    SEGMENT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SAMPLED: tl.constexpr,
    HAS_MEANS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write one list: its keys, how many, and with HAS_MEANS how many keys of each block are not in it.

    Lists stand as `importance_kernel` leaves them: index [lists, capacity], count [lists], skipped [lists, blocks].
    Program (segment, list of all batch entries and groups).
    """
    log2_threshold = float32(log2_threshold)
    segment = first_segment + tl.num_programs(0) - 1 - tl.program_id(0)
    place = (tl.program_id(1) * tl.num_programs(0) + segment - first_segment).to(tl.int64)
    begin, low, _ = span(segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW)
    end = low if CAUSAL else tl.where(segment < ranked_segments, keys, low)
    importance += place * capacity - begin
    index += place * capacity
    listed = 0
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        score = tl.load(importance + column, mask=column < end, other=float("-inf"))
        bar = log2_threshold + tl.zeros([BLOCK_N], tl.float32)
        if SAMPLED:
            bar += tl.log2(draws(column, segment))
        keep = score >= bar
        kept = keep.to(tl.int32)
        tl.store(index + listed + tl.cumsum(kept, 0) - kept, column, mask=keep)
        listed += tl.sum(kept, 0)
        if HAS_MEANS:
            left = (score > float("-inf")) & (score < bar)
            left = tl.sum(tl.reshape(left.to(tl.int32), [BLOCK_N // KEY_BLOCK, KEY_BLOCK]), 1)
            block = start // KEY_BLOCK + tl.arange(0, BLOCK_N // KEY_BLOCK)
            tl.store(skipped + place * blocks + block, left, mask=block * KEY_BLOCK < end)
    tl.store(count + place, listed)
