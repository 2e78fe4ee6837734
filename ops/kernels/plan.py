"""What `attend_hopper_kernel` attends, tile by tile: arithmetic that it would otherwise do in its registers."""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .helpers import clip, span

FIELDS = tl.constexpr(8)
"""Numbers of an item: its list, its KV group, how many keys are listed, its dense span [low, end), its tile, and its
query heads [first, end)."""


@triton.jit
def plan_kernel(
    count,
    plan,
    queries,
    keys,
    first_segment,
    segments,
    ranked_segments,
    tiles,
    offset,
    near_keys,
    groups,
    items,
    SEGMENT: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    LISTS: tl.constexpr,
    HEADS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write the plan [B, FIELDS, items] int32 of a run of segments, of `tiles` in all: by group, latest tiles first.

    `count` [B, groups, LISTS, segments] says how many keys each list has. Program (block of items; batch entry).
    """
    per_segment: tl.constexpr = SEGMENT // TILE
    of_list: tl.constexpr = GROUP // LISTS
    parts_of_list: tl.constexpr = (of_list + HEADS - 1) // HEADS
    parts: tl.constexpr = LISTS * parts_of_list
    item = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = item < items
    part, group = item % parts, item // parts // tiles
    which = part // parts_of_list
    tile = first_segment * per_segment + tiles - 1 - item // parts % tiles
    segment = tile // per_segment
    _, low, high = span(segment, queries, keys, offset, 0, near_keys, ranked_segments, SEGMENT, CAUSAL, False)
    end = high
    if CAUSAL:
        end = tl.maximum(low, clip(tl.minimum((tile + 1) * TILE, queries) + offset, keys))
    place = ((tl.program_id(1) * groups + group) * LISTS + which) * segments + segment - first_segment
    head = group * GROUP + which * of_list
    first_head = head + part % parts_of_list * HEADS
    plan += tl.program_id(1).to(tl.int64) * items * FIELDS + item
    tl.store(plan, place, mask=inside)
    tl.store(plan + items, group, mask=inside)
    tl.store(plan + 2 * items, tl.load(count + place, mask=inside), mask=inside)
    tl.store(plan + 3 * items, low, mask=inside)
    tl.store(plan + 4 * items, end, mask=inside)
    tl.store(plan + 5 * items, tile, mask=inside)
    tl.store(plan + 6 * items, first_head, mask=inside)
    tl.store(plan + 7 * items, head + of_list, mask=inside)
