"""The keys whose importance reaches their draw, appended to one list per segment with their weights: the selection
where the tail is sampled, as by default.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .arguments import Arguments
from .helpers import KEY_BLOCK, draws, fast_log2, place_list, round_up
from .launch import launch
from .lists import Lists
from .scoring import Scoring
from .variants import kernel

RUN = tl.constexpr(8)
"""Keys that a thread loads at once in half precision, and counts without asking others."""


def sample(arguments: Arguments, importance: torch.Tensor, scoring: Scoring, segments: range) -> Lists:
    """The keys whose importance [B, Hkv, lists, segments, capacity] reaches their draw; their weights overwrite it."""
    lists = Lists.to_fill(arguments, segments, importance, scoring)
    launch(
        sample_kernel, (len(segments), lists.count.numel() // len(segments)),
        importance, arguments.rows, lists.index, lists.count,
        first_segment=segments.start, capacity=lists.capacity,
        **arguments.spans, PAGED=arguments.is_paged, BLOCK_N=1024, num_warps=4, num_stages=2,
    )  # fmt: skip
    return lists


@kernel
def sample_kernel(
    importance, rows, index, count,
    queries, keys, first_segment, ranked_segments, offset, window, near_keys, capacity,
    SEGMENT: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PAGED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write one of the `Lists`, by a prefix sum over the keys that are drawn.

    Log-weights take the place of the first importances: a key stands in the list no later than in the history, so each
    block overwrites only what was read. Program (segment, last first; list of all batch entries and KV heads).
    """
    segment, place, begin, end = place_list(
        first_segment, queries, keys, offset, window, near_keys, ranked_segments, SEGMENT, CAUSAL, WINDOW
    )
    number = segment + tl.maximum(offset, 0) // SEGMENT  # As `Geometry.first_number`.
    importance += place * capacity
    index += place * capacity
    listed = 0
    lane = tl.arange(0, BLOCK_N)
    # Few warps wait for what they load, so each block is loaded while the one before is at work.
    # They are loaded in vectors up to the end of a block, past the last key.
    written = end if CAUSAL else round_up(end, KEY_BLOCK)
    ahead = tl.load(importance + lane, mask=begin + lane < written, other=-1.0)
    for start in range(begin, end, BLOCK_N):
        column, score = start + lane, ahead
        later = column + BLOCK_N
        ahead = tl.load(importance + (later - begin), mask=later < written, other=-1.0)
        chosen = (score < draws(column, number)) == 0
        if not CAUSAL:
            chosen = chosen & (column < end)
        kept = tl.reshape(chosen.to(tl.int32), [BLOCK_N // RUN, RUN])
        of_run = tl.sum(kept, 1)
        position = (listed + tl.cumsum(of_run, 0) - of_run)[:, None] + tl.cumsum(kept, 1) - kept
        tl.store(index + position, tl.reshape(column, [BLOCK_N // RUN, RUN]), mask=kept > 0)
        listed += tl.sum(of_run, 0)
    tl.store(count + place, listed)
    tl.debug_barrier()
    for start in range(0, listed, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        column = tl.load(index + position, mask=position < listed, other=0)
        chance = tl.load(importance + (column - begin), mask=position < listed, other=1.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(importance + position, tl.maximum(-fast_log2(chance), 0.0), mask=position < listed)
        if PAGED:
            row = tl.load(rows + column, mask=position < listed, other=0)
            tl.store(index + position, row, mask=position < listed)
