"""Guides that stand for alike queries: `rule.merging`, for all segments of a list at once.

The guides of a list and segment follow one another, those of its first head first; `counts` say how many they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..rule import merging
from .arguments import Arguments, padded
from .helpers import INTERPRETED, LOG2_E, float32
from .launch import launch
from .quantise import FLOAT8, Units, float8_unit, picking, raise_range, store_rows
from .variants import kernel

MERGED = merging.MERGED
LARGEST = tl.constexpr(60000.0)
"""Of squared distances: what float16 has room for."""
_ROWS = 64
_COLUMNS = 64
"""Queries and channels of a block."""
_BLOCKS = 8
"""Blocks of queries whose distances one program finds, where it holds the whole covariance."""
_RUNS = 4
"""Runs whose means one program writes in float8."""


class MergedGuides(NamedTuple):
    """The guides of `most` queries of each list and segment, in as many places; those from `counts` on are undefined.

    Attributes:
        rows: [B, Hkv, lists, segments * most, D], in the dtype of queries or in float8.
        subset: Their picked channels, and digits of 0 that `fold` writes, [B, Hkv, lists, segments * most, picked +
            digits]; `rows` where none are picked.
        counts: [B, Hkv, lists, segments] int32, how many there are.
        reach: [B, Hkv, lists, segments * most] float32, how far their logits reach, in units of log 2.
        first: [B, Hkv, lists, segments * most] int32, the position of the first query of each.
        owner: [B, Hkv, G, Lq] int32, the place of each query's guide in its segment.
    """

    rows: torch.Tensor
    subset: torch.Tensor
    counts: torch.Tensor
    reach: torch.Tensor
    first: torch.Tensor
    owner: torch.Tensor


def merge(
    arguments: Arguments,
    covariance: torch.Tensor,
    units: Units | None = None,
    channels: torch.Tensor | None = None,
    digits: int = 0,
) -> MergedGuides:
    """The queries merged, given the `covariance` of keys [B, Hkv, BLOCK_D, BLOCK_D], float32, times scale squared.

    With `units` they are in float8 (`quantise`), of the reach of queries, to which the ranges are raised; and so are
    their picked `channels` [B, Hkv, picked] int32, if there are some, with as many `digits` of 0 behind them.
    """
    query, ranking, size = arguments.query, arguments.config.ranking, arguments.query.shape[-1]
    batch, heads, queries, _ = query.shape
    run, segments = min(MERGED, ranking.segment), arguments.geometry.segments
    runs = segments * (ranking.segment // run)
    is_exact, width = query.dtype == torch.float32, padded(size)
    apart = query.new_empty(batch, heads, runs, run, run, dtype=torch.float32 if is_exact else torch.float16)
    is_whole = not is_exact and width <= 2 * _COLUMNS
    together, blocks = _ROWS // run, _BLOCKS if is_whole else 1
    ranges = covariance if units is None else units.ranges
    launch(
        distance_kernel, (-(-runs // (together * blocks)), heads, batch),
        query, covariance, apart, ranges, *query.stride()[:3], heads // arguments.kv_heads, queries, runs,
        RUN=run, RUNS=together, BLOCKS=blocks, EXACT=is_exact, PRECISION="ieee" if is_exact else "tf32",
        FLOAT8=units is not None, D=size, BLOCK_D=width, BLOCK_C=width if is_whole else min(width, _COLUMNS),
        num_warps=4 if width <= 2 * _COLUMNS else 8, num_stages=1,
    )  # fmt: skip
    of_run = query.new_empty(batch, heads, queries, dtype=torch.int32)
    clusters = query.new_empty(batch, heads, runs, dtype=torch.int32)
    reach = query.new_empty(batch, heads, runs, run, dtype=torch.float32)
    launch(
        cluster_kernel, (runs, heads, batch), apart, of_run, clusters, reach, queries, ranking.radius,
        RUN=run, num_warps=1, num_stages=1,
    )  # fmt: skip
    lists, most = arguments.lists, arguments.guides_of_segment
    shape, dtype = (batch, arguments.kv_heads, lists), query.dtype if units is None else FLOAT8
    rows = query.new_empty(*shape, segments * most, size, dtype=dtype)
    picked = 0 if channels is None else channels.shape[-1]
    found = MergedGuides(
        rows,
        query.new_empty(*shape, segments * most, picked + digits, dtype=dtype) if picked else rows,
        query.new_empty(*shape, segments, dtype=torch.int32),
        query.new_empty(*shape, segments * most, dtype=torch.float32),
        query.new_empty(*shape, segments * most, dtype=torch.int32),
        query.new_empty(batch, arguments.kv_heads, heads // arguments.kv_heads, queries, dtype=torch.int32),
    )
    turns = 1 if units is None else _RUNS
    launch(
        mean_kernel, (-(-runs // turns), heads, batch),
        query, of_run, clusters, reach, ranges, clusters if channels is None else channels, *found,
        *query.stride()[:3], heads // arguments.kv_heads, queries, runs, segments,
        HEADS=heads // (arguments.kv_heads * lists), SEGMENT=ranking.segment, RUN=run, TURNS=turns,
        PARTS=triton.next_power_of_2(most // run), FLOAT8=units is not None, PICKED=picked,
        WIDTH=picked + digits, BLOCK_P=padded(picked + digits),
        D=size, BLOCK_D=width, num_warps=2 if units is None or width > 2 * _COLUMNS else 1, num_stages=1,
    )  # fmt: skip
    return found


@triton.jit
def load_origins(lse, reach, guide, real, correction):
    """What is added to the logits of guides, -inf where they are not `real`.

    Less their log-sum-exp, with what is allowed for the queries that they stand for, and a `correction` of channels.
    """
    far = tl.load(reach + guide, mask=real, other=0.0)
    return tl.sqrt(far * far + correction * correction) - tl.load(lse + guide, mask=real, other=float("inf"))


@triton.jit
def _load_runs(query, run, real, stride_n, first, D: tl.constexpr, RUN: tl.constexpr, BLOCK_C: tl.constexpr):
    """The channels from `first` on of the queries of runs [n * RUN, BLOCK_C], and of the first of the run of each."""
    channel = first + tl.arange(0, BLOCK_C)
    position = run * RUN + tl.arange(0, real.shape[0]) % RUN
    mask = real[:, None] & (channel < D)[None, :]
    rows = tl.load(query + position.to(tl.int64)[:, None] * stride_n + channel[None, :], mask=mask, other=0.0)
    origin = tl.load(query + (run * RUN).to(tl.int64)[:, None] * stride_n + channel[None, :], mask=mask, other=0.0)
    return rows.to(tl.float32), origin.to(tl.float32)


@kernel
def distance_kernel(
    query, covariance, apart, ranges, stride_b, stride_h, stride_n, group_size, queries, runs,
    RUN: tl.constexpr, RUNS: tl.constexpr, BLOCKS: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    FLOAT8: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the squared distances of the queries of each run, `apart` [B, Hq, runs, RUN, RUN].

    0 where a query is past the end, or the distance NaN. With FLOAT8, `ranges` [B, Hkv] are raised to the reach of
    queries. Program (BLOCKS times RUNS runs; query head; batch entry).
    """
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_head = batch * (tl.num_programs(1) // group_size) + head // group_size
    rows: tl.constexpr = RUNS * RUN
    query += batch * stride_b + head * stride_h
    covariance += kv_head * BLOCK_D * BLOCK_D
    apart += (batch * tl.num_programs(1) + head) * runs * (RUN * RUN)
    channel, lane = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    # The interpreter multiplies the bits of bfloat16.
    dtype: tl.constexpr = tl.float32 if EXACT or INTERPRETED else tl.bfloat16
    if BLOCK_C == BLOCK_D:
        block = tl.load(covariance + channel[:, None] * BLOCK_D + channel[None, :]).to(dtype)
    furthest = tl.zeros([rows], tl.int32)
    for turn in range(BLOCKS):
        first_run = (tl.program_id(0) * BLOCKS + turn) * RUNS
        row = first_run * RUN + tl.arange(0, rows)
        real = row < queries
        # From the first of their run, queries are small, so that differences of their products are exact enough.
        x, origin = _load_runs(query, row // RUN, real, stride_n, 0, D, RUN, BLOCK_D)
        if FLOAT8:
            furthest = tl.maximum(furthest, tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1))
        whole = (x - origin).to(dtype)
        # Products of all rows with all, of which those of a run are kept: large ones are fast.
        if BLOCK_C == BLOCK_D:
            product = tl.dot(whole, block, input_precision=PRECISION).to(dtype)
            gram = tl.dot(product, tl.trans(whole), input_precision=PRECISION)
        else:
            gram = tl.zeros([rows, rows], tl.float32)
            for first in tl.static_range(0, BLOCK_D, BLOCK_C):
                columns = tl.load(covariance + channel[:, None] * BLOCK_D + (first + lane)[None, :]).to(dtype)
                product = tl.dot(whole, columns, input_precision=PRECISION).to(dtype)
                x, origin = _load_runs(query, row // RUN, real, stride_n, first, D, RUN, BLOCK_C)
                gram = tl.dot(product, tl.trans((x - origin).to(dtype)), gram, input_precision=PRECISION)
        _store_distances(apart, gram, first_run, runs, real, RUN, RUNS)
    if FLOAT8:
        raise_range(ranges + kv_head, tl.max(furthest, 0))


@triton.jit
def _store_distances(apart, gram, first_run, runs, real, RUN: tl.constexpr, RUNS: tl.constexpr):
    """Write the squared distances of the `real` queries of each of RUNS runs, by all their products."""
    rows: tl.constexpr = RUNS * RUN
    number, place = tl.arange(0, RUNS), tl.arange(0, RUN)
    of_row = tl.arange(0, rows) // RUN
    gram = tl.sum(tl.where(of_row[:, None, None] == number[None, :, None], tl.reshape(gram, [rows, RUNS, RUN]), 0.0), 1)
    is_same = (tl.arange(0, rows) % RUN)[:, None] == place[None, :]
    square = tl.reshape(tl.sum(tl.where(is_same, gram, 0.0), 1), [RUNS, RUN])
    gram = tl.reshape(gram, [RUNS, RUN, RUN])
    distance = square[:, :, None] + square[:, None, :] - 2 * gram
    counts = tl.reshape(real, [RUNS, RUN])
    # Not so where it is NaN, which a minimum would lose.
    counts = counts[:, :, None] & counts[:, None, :] & (distance > 0)
    distance = tl.where(counts, tl.minimum(distance, LARGEST), 0.0)
    run = first_run + number
    first_row = run.to(tl.int64)[:, None, None] * RUN + place[None, :, None]
    tl.store(apart + first_row * RUN + place[None, None, :], distance, mask=(run < runs)[:, None, None])


@kernel
def cluster_kernel(apart, owner, clusters, reach, queries, radius, RUN: tl.constexpr):
    """Write the cluster of each query, `owner` [B, Hq, Lq]; how many a run has [B, Hq, runs]; how far each reaches.

    The last, `reach` [B, Hq, runs, RUN], is in units of log 2. Program (run; query head; batch entry): a single warp,
    whose steps wait for no other.
    """
    of_head = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    run = of_head * tl.num_programs(0) + tl.program_id(0)
    apart += run * (RUN * RUN)
    limit = float32(radius) * float32(radius)
    place = tl.arange(0, RUN)
    position = tl.program_id(0) * RUN + place
    real = position < queries
    nearest = tl.where(real, float("inf"), 0.0)
    cluster = tl.zeros([RUN], tl.int32)
    between = tl.load(apart + place[:, None] * RUN + place[None, :]).to(tl.float32)
    from_all = tl.where(real, tl.sum(between, 1), float("inf"))
    farthest, number, left = tl.argmin(from_all, 0), 0, tl.max(nearest, 0)
    while (left > limit) & (number < RUN):
        distance = tl.load(apart + farthest * RUN + place).to(tl.float32)
        closer = distance < nearest
        cluster = tl.where(closer, number, cluster)
        nearest = tl.where(closer, distance, nearest)
        farthest, number, left = tl.argmax(nearest, 0), number + 1, tl.max(nearest, 0)

    # The squared distance of a query from the mean of its cluster: that from its members, less half of what these have.
    together = (cluster[:, None] == cluster[None, :]) & real[:, None] & real[None, :]
    size = tl.maximum(tl.sum(together.to(tl.float32), 1), 1.0)
    from_members = tl.sum(tl.where(together, between, 0.0), 1) / size
    of_members = tl.sum(tl.where(together, from_members[:, None], 0.0), 0)
    of_members /= tl.maximum(tl.sum(together.to(tl.float32), 0), 1.0)
    from_mean = tl.sqrt(tl.maximum(from_members - of_members / 2, 0.0))
    is_member = (cluster[None, :] == place[:, None]) & real[None, :]
    tl.store(reach + run * RUN + place, tl.max(tl.where(is_member, from_mean[None, :], 0.0), 1) * LOG2_E)
    tl.store(owner + of_head * queries + position, cluster, mask=real)
    tl.store(clusters + run, number)


@kernel
def mean_kernel(
    query, of_run, clusters, reach_of_run, ranges, picked, rows, subset, count, reach, first, owner,
    stride_b, stride_h, stride_n, group_size, queries, runs, segments,
    HEADS: tl.constexpr, SEGMENT: tl.constexpr, RUN: tl.constexpr, TURNS: tl.constexpr, PARTS: tl.constexpr,
    FLOAT8: tl.constexpr, PICKED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_P: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the guides of a run, the means of its clusters, behind those of other runs of its segment and list.

    With FLOAT8 in units of `ranges` [B, Hkv], and of them the channels `picked` [B, Hkv, PICKED], if PICKED is not 0.
    HEADS heads share a list; PARTS are at least their runs of a segment. Program (TURNS runs; query head; batch entry).
    """
    runs_of_head: tl.constexpr = SEGMENT // RUN
    heads, head, batch = tl.num_programs(1), tl.program_id(1), tl.program_id(2).to(tl.int64)
    of_head, kv_head = batch * heads + head, batch * (heads // group_size) + head // group_size
    query += batch * stride_b + head.to(tl.int64) * stride_h
    place, channel, other = tl.arange(0, RUN), tl.arange(0, BLOCK_D), tl.arange(0, PARTS)
    unit = float8_unit(ranges + kv_head) if FLOAT8 else 1.0
    if PICKED > 0:
        ones = picking(picked + kv_head * PICKED, tl.float16, BLOCK_D, PICKED, BLOCK_P)
    for turn in range(TURNS):
        run = tl.program_id(0) * TURNS + turn
        segment, part = run // runs_of_head, (head % HEADS) * runs_of_head + run % runs_of_head
        of_other = (batch * heads + head // HEADS * HEADS + other // runs_of_head) * runs
        of_other += segment * runs_of_head + other % runs_of_head
        parts = tl.where(run < runs, HEADS * runs_of_head, 0)
        counts = tl.load(clusters + of_other, mask=other < parts, other=0)
        before = tl.sum(tl.where(other < part, counts, 0), 0)
        here = tl.sum(tl.where(other == part, counts, 0), 0)
        of_list = (batch * (heads // HEADS) + head // HEADS) * segments + segment
        tl.store(count + of_list, before + here, mask=part == parts - 1)

        position = run * RUN + place
        real = position < queries
        cluster = tl.load(of_run + of_head * queries + position, mask=real, other=RUN)
        tl.store(owner + of_head * queries + position, before + cluster, mask=real)
        is_member = cluster[None, :] == place[:, None]
        is_guide, target = place < here, of_list * (HEADS * SEGMENT) + before + place
        far = tl.load(reach_of_run + (of_head * runs + run) * RUN + place, mask=is_guide, other=0.0)
        tl.store(reach + target, far, mask=is_guide)
        earliest = tl.min(tl.where(is_member, place[None, :], RUN), 1)
        tl.store(first + target, run * RUN + earliest, mask=is_guide)
        pointers = query + position.to(tl.int64)[:, None] * stride_n + channel[None, :]
        x = tl.load(pointers, mask=real[:, None] & (channel < D)[None, :], other=0.0)
        mean = tl.dot(is_member.to(x.dtype), x, input_precision="ieee")
        mean = (mean * (unit / tl.maximum(tl.sum(is_member.to(tl.float32), 1), 1.0))[:, None]).to(rows.dtype.element_ty)
        store_rows(mean, rows, target, is_guide, D, BLOCK_D)
        if PICKED > 0:
            store_rows(tl.dot(mean.to(tl.float16), ones), subset, target, is_guide, WIDTH, BLOCK_P)
