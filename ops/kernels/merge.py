"""Guides that stand for alike queries: `rule.merging`, for all segments of a list at once.

The guides of a list and segment follow one another, those of its first head first; a `count` says how many they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rule import merging
from .arguments import Arguments, padded
from .helpers import LOG2_E, float32
from .launch import launch
from .variants import kernel

MERGED = merging.MERGED
_COLUMNS = 64
"""Channels of a block."""


class MergedGuides(NamedTuple):
    """The guides of `most` queries of each list and segment, in as many places; those from `count` on are undefined.

    Attributes:
        rows: [B, Hkv, lists, segments * most, D], in the dtype of queries.
        count: [B, Hkv, lists, segments] int32.
        reach: [B, Hkv, lists, segments * most] float32, how far their logits reach, in units of log 2.
        first: [B, Hkv, lists, segments * most] int32, the position of the first query of each.
        owner: [B, Hkv, G, Lq] int32, the place of each query's guide in its segment.
    """

    rows: torch.Tensor
    count: torch.Tensor
    reach: torch.Tensor
    first: torch.Tensor
    owner: torch.Tensor


def merge(arguments: Arguments, covariance: torch.Tensor) -> MergedGuides:
    """The queries merged, given the `covariance` of keys [B, Hkv, BLOCK_D, BLOCK_D], float32, times scale squared."""
    query, ranking, size = arguments.query, arguments.config.ranking, arguments.query.shape[-1]
    heads, segments = arguments.group_size // arguments.lists, arguments.geometry.segments
    most, run = heads * ranking.segment, min(MERGED, ranking.segment)
    lists = query.shape[0], arguments.kv_heads, arguments.lists
    found = MergedGuides(
        query.new_empty(*lists, segments * most, size),
        query.new_empty(*lists, segments, dtype=torch.int32),
        query.new_empty(*lists, segments * most, dtype=torch.float32),
        query.new_empty(*lists, segments * most, dtype=torch.int32),
        query.new_empty(*lists[:2], arguments.group_size, query.shape[2], dtype=torch.int32),
    )
    runs = min(triton.next_power_of_2(most // run), max(1, (128 if padded(size) <= 128 else 64) // run))
    is_exact = query.dtype == torch.float32
    launch(
        merge_kernel, (segments, arguments.lists, arguments.batch_kv_heads),
        query, covariance, *found, *query.stride()[:3],
        kv_heads=arguments.kv_heads, queries=query.shape[2], radius=ranking.radius,
        HEADS=heads, SEGMENT=ranking.segment, RUN=run, RUNS=runs, PRECISION="ieee" if is_exact else "tf32",
        D=size, BLOCK_D=padded(size), BLOCK_C=min(padded(size), _COLUMNS), num_warps=8 if runs * run > 64 else 4,
        num_stages=1,
    )  # fmt: skip
    return found


@triton.jit
def _centred(query, head, position, real, stride_h, stride_n, first, D, RUNS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels from `first` on of queries [RUNS * n, BLOCK_C], less their means over each run, float32."""
    channel = first + tl.arange(0, BLOCK_C)
    pointers = query + head.to(tl.int64)[:, None] * stride_h + position.to(tl.int64)[:, None] * stride_n
    rows = tl.load(pointers + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    run: tl.constexpr = rows.shape[0] // RUNS
    number = tl.maximum(tl.sum(tl.reshape(real.to(tl.float32), [RUNS, run]), 1), 1.0)
    mean = tl.sum(tl.reshape(rows, [RUNS, run, BLOCK_C]), 1) / number[:, None]
    mean = tl.reshape(tl.broadcast_to(mean[:, None, :], [RUNS, run, BLOCK_C]), [RUNS * run, BLOCK_C])
    return tl.where(real[:, None], rows - mean, 0.0)


@triton.jit
def _squares(
    query, covariance, head, position, real, stride_h, stride_n, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The squared distances of the queries of each run [RUNS, n, n], 0 where one is not real or the distance NaN.

    And those from the mean of each run [RUNS, n].
    """
    rows: tl.constexpr = real.shape[0]
    run: tl.constexpr = rows // RUNS
    channel, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    whole = _centred(query, head, position, real, stride_h, stride_n, 0, D, RUNS, BLOCK_D)
    gram = tl.zeros([rows, rows], tl.float32)
    for first in tl.static_range(0, BLOCK_D, BLOCK_C):
        block = tl.load(covariance + channel[:, None] * BLOCK_D + (first + lane)[None, :])
        part = _centred(query, head, position, real, stride_h, stride_n, first, D, RUNS, BLOCK_C)
        product = tl.dot(whole, block, input_precision=PRECISION)
        gram = tl.dot(product, tl.trans(part), gram, input_precision=PRECISION)
    number = tl.arange(0, RUNS)
    is_own = number[:, None, None, None] == number[None, None, :, None]
    gram = tl.sum(tl.where(is_own, tl.reshape(gram, [RUNS, run, RUNS, run]), 0.0), 2)
    place = tl.arange(0, run)
    square = tl.sum(tl.where(place[None, :, None] == place[None, None, :], gram, 0.0), 2)
    across = tl.sum(tl.where(place[None, :, None] == place[None, None, :], gram, 0.0), 1)
    apart = square[:, :, None] + across[:, None, :] - 2 * gram
    counts = tl.reshape(real, [RUNS, run])
    apart = tl.where(counts[:, :, None] & counts[:, None, :] & (apart > 0), apart, 0.0)
    central = tl.where(counts, tl.where(square > 0, square, 0.0), float("inf"))
    return apart, central


@triton.jit
def _farthest_first(apart, central, real, radius):
    """The cluster of each query [RUNS, n], and how many there are in each run [RUNS]."""
    run: tl.constexpr = apart.shape[2]
    place = tl.arange(0, run)
    nearest = tl.where(real, float("inf"), 0.0)
    owner = tl.zeros(real.shape, tl.int32)
    count = tl.zeros([apart.shape[0]], tl.int32)
    farthest = tl.argmin(central, 1)
    number, left = 0, tl.max(tl.max(nearest, 1), 0)
    while (left > radius * radius) & (number < run):
        goes_on = tl.max(nearest, 1) > radius * radius
        chosen = place[None, :] == farthest[:, None]
        distance = tl.sum(tl.where(chosen[:, :, None], apart, 0.0), 1)
        closer = goes_on[:, None] & (distance < nearest)
        owner = tl.where(closer, number, owner)
        nearest = tl.where(closer, distance, nearest)
        count += goes_on.to(tl.int32)
        farthest = tl.argmax(nearest, 1)
        number += 1
        left = tl.max(tl.max(nearest, 1), 0)
    return owner, count


@kernel
def merge_kernel(
    query, covariance, rows, count, reach, first, owner, stride_b, stride_h, stride_n, kv_heads, queries, radius,
    HEADS: tl.constexpr, SEGMENT: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the `MergedGuides` of a list of HEADS heads and a segment; RUNS runs of RUN positions of a head at a time.

    Program (segment; list; batch entry and KV head).
    """
    radius = float32(radius)
    batch, kv_head = (tl.program_id(2) // kv_heads).to(tl.int64), tl.program_id(2) % kv_heads
    lists = tl.num_programs(1)
    query += batch * stride_b
    covariance += tl.program_id(2).to(tl.int64) * BLOCK_D * BLOCK_D
    place = (tl.program_id(2) * lists + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    base = place.to(tl.int64) * (HEADS * SEGMENT)
    runs_of_head: tl.constexpr = SEGMENT // RUN
    row, number, inner = tl.arange(0, RUNS * RUN), tl.arange(0, RUNS), tl.arange(0, RUN)
    channel = tl.arange(0, BLOCK_D)
    done = 0
    for start in range(0, HEADS * runs_of_head, RUNS):
        head = (start + row // RUN) // runs_of_head
        position = tl.program_id(0) * SEGMENT + (start + row // RUN) % runs_of_head * RUN + row % RUN
        real = (head < HEADS) & (position < queries)
        query_head = (kv_head * lists + tl.program_id(1)) * HEADS + head
        apart, central = _squares(
            query, covariance, query_head, position, real, stride_h, stride_n, D, BLOCK_D, BLOCK_C, RUNS, PRECISION
        )
        counts = tl.reshape(real, [RUNS, RUN])
        of_run, guides = _farthest_first(apart, central, counts, radius)

        # The distance of each query from the mean of its cluster: that from its members, less half of what these have.
        together = (of_run[:, :, None] == of_run[:, None, :]) & counts[:, :, None] & counts[:, None, :]
        size = tl.maximum(tl.sum(together.to(tl.float32), 2), 1.0)
        from_members = tl.sum(tl.where(together, apart, 0.0), 2) / size
        of_members = tl.sum(tl.where(together, from_members[:, :, None], 0.0), 1)
        of_members /= tl.maximum(tl.sum(together.to(tl.float32), 1), 1.0)
        distance = tl.sqrt(tl.maximum(from_members - of_members / 2, 0.0))
        is_member = (of_run[:, None, :] == inner[None, :, None]) & counts[:, None, :]
        furthest = tl.max(tl.where(is_member, distance[:, None, :], 0.0), 2)
        earliest = tl.min(tl.where(is_member, inner[None, None, :], RUN), 2)

        before = done + tl.cumsum(guides, 0) - guides
        target = tl.reshape(base + before[:, None] + inner[None, :], [RUNS * RUN])
        is_guide = tl.reshape(inner[None, :] < guides[:, None], [RUNS * RUN])
        of_place = tl.program_id(0) * SEGMENT + (start + number) % runs_of_head * RUN
        tl.store(reach + target, tl.reshape(furthest, [RUNS * RUN]) * LOG2_E, mask=is_guide)
        tl.store(first + target, tl.reshape(of_place[:, None] + earliest, [RUNS * RUN]), mask=is_guide)
        within = tl.reshape(before[:, None] + of_run, [RUNS * RUN])
        tl.store(owner + (batch * kv_heads * lists * HEADS + query_head) * queries + position, within, mask=real)

        pointers = query + query_head.to(tl.int64)[:, None] * stride_h + position.to(tl.int64)[:, None] * stride_n
        x = tl.load(pointers + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=0.0)
        cluster = tl.reshape(number[:, None] * RUN + of_run, [RUNS * RUN])
        members = (cluster[None, :] == row[:, None]) & real[None, :]
        mean = tl.dot(members.to(x.dtype), x, input_precision="ieee")
        mean /= tl.maximum(tl.sum(members.to(tl.float32), 1), 1.0)[:, None]
        pointers = rows + target[:, None] * D + channel[None, :]
        tl.store(pointers, mean.to(x.dtype), mask=is_guide[:, None] & (channel < D)[None, :])
        done += tl.sum(guides, 0)
    tl.store(count + place, done)
