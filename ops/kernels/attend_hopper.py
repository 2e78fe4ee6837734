"""Attention of tiles of 128 rows on Hopper, in Gluon: two warpgroups gather keys and values for each other.

Two partitions of four warps attend 64 rows each, and copy half of every block of keys and values themselves. They run
free of each other but for barriers in shared memory, so that one's softmax overlaps the other's products; and within a
partition the products of a block's keys are issued together with those of the values of the block before
(FlashAttention-3, arXiv 2407.08608). Copies run ahead of products, those of keys by two blocks, those of values by one
and a half.

A program attends one tile after another (an item each) as one sequence of blocks: the values of a tile's last block are
multiplied together with the keys of the next tile's first, after which the tile is stored. A tile's keys are those of
its list and, behind them, those of its dense span. The blocks that hold some of the latter, or are not full, come
first: only they are masked. `plan_kernel` says what each item is.
"""

# mypy: ignore-errors
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .plan import FIELDS

copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
"""Triton changed its name."""
ROWS = gl.constexpr(128)
"""Rows of a tile: heads that share a list, times positions."""
BLOCK_N = gl.constexpr(128)
HALF = gl.constexpr(64)
"""Keys of a block, and rows of a tile, of each partition."""
KEY_BLOCK = gl.constexpr(64)
STAGES = gl.constexpr(3)
BEYOND = gl.constexpr(2**30)
LN_2 = gl.constexpr(0.6931471805599453)
REGISTERS = gl.constexpr(240)
"""A thread of the second partition: as many leave ptxas room for all that the loop holds, and the first gets 256."""


@gluon.jit
def _round_up(count):
    return (count + KEY_BLOCK - 1) // KEY_BLOCK * KEY_BLOCK


@gluon.jit
def _keys(plan, items, item):
    """An item's list, its KV group, how many keys are listed, and its dense span [low, end)."""
    plan += gl.minimum(item, items - 1)
    return (
        gl.load(plan),
        gl.load(plan + items),
        gl.load(plan + 2 * items),
        gl.load(plan + 3 * items),
        gl.load(plan + 4 * items),
    )


@gluon.jit
def _blocks(listed, low, end):
    """How many blocks an item has, at least one."""
    return gl.maximum((listed + end - low + BLOCK_N - 1) // BLOCK_N, 1)


@gluon.jit
def _masked_blocks(listed, blocks):
    """How many blocks of an item come first, all but those that are full of listed keys."""
    return blocks - gl.minimum(listed // BLOCK_N, blocks - 1)


@gluon.jit
def _start(block, listed, blocks):
    """Where in an item's keys its n-th block starts."""
    masked = _masked_blocks(listed, blocks)
    return gl.where(block < masked, block + blocks - masked, block - masked) * BLOCK_N


@gluon.jit
def _cursor(plan, items, turn):
    """Where copies stand: the turn and its first block, and of the item what `_rows` needs."""
    place, group, listed, low, end = _keys(plan, items, gl.program_id(0) + turn * gl.num_programs(0))
    return turn, turn * 0, place, group, listed, low, _blocks(listed, low, end)


@gluon.jit
def _advance(plan, items, cursor):
    """The cursor one block further: in its item, or at the first block of the next one."""
    turn, block, place, group, listed, low, blocks = cursor
    block += 1
    if block == blocks:
        turn, block, place, group, listed, low, blocks = _cursor(plan, items, turn + 1)
    return turn, block, place, group, listed, low, blocks


@gluon.jit
def _rows(index, capacity, keys, cursor, PART: gl.constexpr, COPY: gl.constexpr):
    """The keys of this partition's half of the block at the cursor, and where their weights stand."""
    _, block, place, _, listed, low, blocks = cursor
    start = _start(block, listed, blocks)
    index += place.to(gl.int64) * capacity
    lane = start + PART * HALF + gl.arange(0, HALF, gl.SliceLayout(1, COPY))
    if start + BLOCK_N <= listed:
        rows = gl.load(index + lane)
    else:
        dense = gl.maximum(gl.minimum(low + lane - listed, keys - 1), 0)
        rows = gl.where(lane < listed, gl.load(index + lane, mask=lane < listed, other=0), dense)
    # Of a block without listed keys nobody wants the weights.
    return rows, place.to(gl.int64) * capacity + gl.minimum(start, capacity - BLOCK_N)


@gluon.jit
def _gather(buffer, slot, base, rows, PART: gl.constexpr, STRIDE: gl.constexpr, COPY: gl.constexpr):
    """Copy this partition's half of a block of keys or values."""
    channel = gl.arange(0, buffer.shape[2], gl.SliceLayout(0, COPY))
    pointers = (base + channel)[None, :] + rows.to(gl.int64)[:, None] * STRIDE
    copy_rows(buffer.index(slot).slice(PART * HALF, HALF, 0), pointers)


@gluon.jit
def _gather_keys(
    key, stride_h, weights, k_buffer, w_buffer, k_ready, slot, group, rows, at,
    PART: gl.constexpr, STRIDE: gl.constexpr, COPY: gl.constexpr, SAMPLED: gl.constexpr,
):  # fmt: skip
    _gather(k_buffer, slot, key + group.to(gl.int64) * stride_h, rows, PART, STRIDE, COPY)
    if SAMPLED:
        # Copies are of four bytes at least.
        WIDTH: gl.constexpr = 32 // weights.dtype.element_ty.primitive_bitwidth
        lane = PART * HALF + gl.arange(0, HALF, gl.BlockedLayout([WIDTH], [32], [4], [0]))
        copy_rows(w_buffer.index(slot).slice(PART * HALF, HALF, 0), weights + at + lane)
    async_copy.mbarrier_arrive(k_ready.index(slot), increment_count=False)


@gluon.jit
def _gather_values(
    value, stride_h, v_buffer, v_ready, slot, group, rows,
    PART: gl.constexpr, STRIDE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    _gather(v_buffer, slot, value + group.to(gl.int64) * stride_h, rows, PART, STRIDE, COPY)
    async_copy.mbarrier_arrive(v_ready.index(slot), increment_count=False)


@gluon.jit
def _places(plan, items, item, queries, PART: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """The heads and positions of this partition's rows, and which of them are real."""
    TILE: gl.constexpr = SHAPE[0]
    HEADS: gl.constexpr = SHAPE[1]
    plan += gl.minimum(item, items - 1)
    tile, first_head, end_head = gl.load(plan + 5 * items), gl.load(plan + 6 * items), gl.load(plan + 7 * items)
    row = PART * HALF + gl.arange(0, HALF, LAYOUT)
    head, position = first_head + row // TILE, tile * TILE + row % TILE
    return head.to(gl.int64), position, (head < end_head) & (row < HEADS * TILE) & (position < queries)


@gluon.jit
def _see(
    logits, plan, items, item, queries, keys, offset, start, listed, low, end,
    PART: gl.constexpr, SHAPE: gl.constexpr, ROW: gl.constexpr, COLUMN: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Logits [M, N] of a block that starts at `start` of an item's keys, -inf where a row does not see a key.

    All rows see what is listed, and of the dense span behind it a row sees the first keys.
    """
    column = gl.arange(0, BLOCK_N, COLUMN)[None, :]
    last = end - 1
    if CAUSAL:
        position = _places(plan, items, item, queries, PART, SHAPE, ROW)[1]
        last = gl.minimum(position + offset, keys - 1)[:, None]
    return gl.where(column <= last + (listed - low - start), logits, float("-inf"))


@gluon.jit
def _power(logits, origin, unit, SAMPLED: gl.constexpr):
    """2 to the power of logits [M, N] over an origin [M]."""
    return gl.exp2(logits - origin[:, None]) if SAMPLED else gl.exp2(logits * unit - (origin * unit)[:, None])


@gluon.jit
def _halves(x):
    """The halves of each row: to reduce them first makes the chains of dependent instructions half as long."""
    return x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute((0, 2, 1)).split()


@gluon.jit
def _largest(logits, LAYOUT: gl.constexpr):
    one, two = _halves(logits)
    return gl.convert_layout(gl.max(gl.maximum(one, two), 1), LAYOUT)


@gluon.jit
def _sum(weights, LAYOUT: gl.constexpr):
    one, two = _halves(weights)
    return gl.convert_layout(gl.sum(one + two, 1), LAYOUT)


@gluon.jit
def _copy_query(
    query, plan, items, item, queries, stride_h, stride_n, q_buffer, q_ready,
    PART: gl.constexpr, SHAPE: gl.constexpr, COPY: gl.constexpr,
):  # fmt: skip
    """Copy the rows of an item; for rows that are not real, those of another one."""
    head, position, real = _places(plan, items, item, queries, PART, SHAPE, gl.SliceLayout(1, COPY))
    rows = gl.where(real, head * stride_h + position.to(gl.int64) * stride_n, 0)
    channel = gl.arange(0, q_buffer.shape[2], gl.SliceLayout(0, COPY))
    copy_rows(q_buffer.index(PART), (query + channel)[None, :] + rows[:, None])
    async_copy.mbarrier_arrive(q_ready.index(PART), increment_count=False)


@gluon.jit
def _store(
    total, maximum, mass, output, lse, visited, plan, items, item, queries, tiles, heads, stride_h, stride_n, unit,
    PART: gl.constexpr, SHAPE: gl.constexpr, SAMPLED: gl.constexpr, LOGITS: gl.constexpr, TOTAL: gl.constexpr,
):  # fmt: skip
    """Write what an item's rows attended."""
    TOTAL_ROW: gl.constexpr = gl.SliceLayout(1, TOTAL)
    TILE: gl.constexpr = SHAPE[0]
    total = total / gl.convert_layout(gl.where(mass == 0, 1.0, mass), TOTAL_ROW)[:, None]
    head, position, real = _places(plan, items, item, queries, PART, SHAPE, TOTAL_ROW)
    pointers = output + head * stride_h + position.to(gl.int64) * stride_n
    channel = gl.arange(0, total.shape[1], gl.SliceLayout(0, TOTAL))
    gl.store(pointers[:, None] + channel[None, :], total.to(output.dtype.element_ty), mask=real[:, None])
    head, position, real = _places(plan, items, item, queries, PART, SHAPE, gl.SliceLayout(1, LOGITS))
    head += gl.program_id(1) * heads
    log = (maximum if SAMPLED else maximum * unit) + gl.log2(mass)
    gl.store(lse + head * queries + position, log * LN_2, mask=real)
    _, _, listed, low, end = _keys(plan, items, item)
    tile = gl.load(plan + item + 5 * items)
    pairs = (_round_up(end - low) + _round_up(listed)) * gl.minimum(queries - tile * TILE, TILE)
    gl.store(visited + head * tiles + tile, pairs.to(gl.int64) + head * 0, mask=real & (position % TILE == 0))


@gluon.jit
def _attend_block(
    state, copies, block, spans, item, done, turn,
    query, key, value, index, weights, plan, output, lse, visited,
    query_stride_h, query_stride_n, key_stride_h, value_stride_h, output_stride_h, output_stride_n,
    queries, keys, tiles, heads, offset, capacity, items, unit,
    q_buffer, k_buffer, v_buffer, w_buffer, q_ready, k_ready, k_free, v_ready, v_free,
    PART: gl.constexpr, SHAPE: gl.constexpr, CAUSAL: gl.constexpr, SAMPLED: gl.constexpr, KEY_STRIDE: gl.constexpr,
    VALUE_STRIDE: gl.constexpr, COPY: gl.constexpr, LOGITS: gl.constexpr, TOTAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Add the values of the block before to the sums, and the mass of this one; copy keys and values ahead.

    With MASKED not all rows may see all keys, and the block before may be the last one of the item before, which is
    then stored.
    """
    maximum, mass, total, shares = state
    cursor, near, near_group, far, far_group, at, slot, phase, slot1, phase1, slot2, phase2 = copies
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    SHARES: gl.constexpr = gl.DotOperandLayout(0, TOTAL, 2)
    ELEMENT: gl.constexpr = query.dtype.element_ty

    mbarrier.wait(k_ready.index(slot), phase)
    zeros = gl.zeros([HALF, BLOCK_N], gl.float32, LOGITS)
    keys_of_block = k_buffer.index(slot).permute((1, 0))
    logits = warpgroup_mma(q_buffer.index(PART), keys_of_block, zeros, use_acc=False, is_async=True)
    # Before a program's first block there are no values, only zeros to multiply them by.
    mbarrier.wait(v_ready.index(slot1), phase1)
    total = warpgroup_mma(shares, v_buffer.index(slot1), total, is_async=True)

    mbarrier.wait(k_free.index(slot1), phase1)
    _gather_keys(
        key, key_stride_h, weights, k_buffer, w_buffer, k_ready, slot1, far_group, far, at, PART, KEY_STRIDE, COPY,
        SAMPLED,
    )  # fmt: skip
    mbarrier.wait(v_free.index(slot2), phase2)
    _gather_values(value, value_stride_h, v_buffer, v_ready, slot2, near_group, near, PART, VALUE_STRIDE, COPY)
    near, near_group = far, far_group
    far, at = _rows(index, capacity, keys, cursor, PART, COPY)
    far_group = cursor[3]

    logits = warpgroup_mma_wait(1, deps=[logits])
    if MASKED:
        listed, low, end, start = spans
    if SAMPLED:
        # In steps of log 2, as weights are; without them in steps of the unit.
        bias = w_buffer.index(slot).load(COLUMN).to(gl.float32)
        if MASKED:
            bias = gl.where(start + gl.arange(0, BLOCK_N, COLUMN) < listed, bias, 0.0)
        logits = logits * unit + bias[None, :]
    mbarrier.arrive(k_free.index(slot))
    before, mass_before = maximum, mass
    if MASKED:
        logits = _see(
            logits, plan, items, item, queries, keys, offset, start, listed, low, end, PART, SHAPE, ROW, COLUMN, CAUSAL
        )
        maximum = gl.where(block > 0, maximum, float("-inf"))
        mass = gl.where(block > 0, mass, 0.0)
    largest = gl.maximum(maximum, _largest(logits, ROW))
    origin = gl.where(largest == float("-inf"), 0.0, largest) if MASKED else largest
    # Exactly 1 where the maximum stays: a rounding of the product would grow with each block.
    decay = gl.exp2(maximum - origin if SAMPLED else (maximum - origin) * unit)
    logits = _power(logits, origin, unit, SAMPLED)
    mass = mass * decay + _sum(logits, ROW)
    next_shares = gl.convert_layout(logits.to(ELEMENT), SHARES)
    # Its branch, and that the wait returns `mass`, keep ptxas from moving the softmax behind the wait.
    cursor = _advance(plan, items, cursor)
    total, mass = warpgroup_mma_wait(0, deps=[total, mass])
    if MASKED:
        if (block == 0) & (done >= 0):
            _store(
                total, before, mass_before, output, lse, visited, plan, items, done, queries, tiles, heads,
                output_stride_h, output_stride_n, unit, PART, SHAPE, SAMPLED, LOGITS, TOTAL,
            )  # fmt: skip
        if (block > 0) | (done >= 0):
            mbarrier.arrive(v_free.index(slot1))
        total = gl.where(block > 0, total, 0.0)
    else:
        mbarrier.arrive(v_free.index(slot1))
    total = total * gl.convert_layout(decay, gl.SliceLayout(1, TOTAL))[:, None]
    copies = (cursor, near, near_group, far, far_group, at, slot2, phase2 ^ 1, slot, phase, slot1, phase1)
    return (largest, mass, total, next_shares), copies


@gluon.jit
def _attend(
    PART: gl.constexpr,
    query, key, value, index, weights, plan, output, lse, visited,
    query_stride_h, query_stride_n, key_stride_h, value_stride_h, output_stride_h, output_stride_n,
    queries, keys, tiles, heads, offset, capacity, items, unit,
    q_buffer, k_buffer, v_buffer, w_buffer, q_ready, k_ready, k_free, v_ready, v_free,
    SHAPE: gl.constexpr, CAUSAL: gl.constexpr, SAMPLED: gl.constexpr, KEY_STRIDE: gl.constexpr,
    VALUE_STRIDE: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """One partition: every item that the program attends, 64 rows of each."""
    # Eight threads copy 128 bytes of a row: what else a row has differs by a constant, and needs no other address.
    COPY: gl.constexpr = gl.BlockedLayout([4, 8], [4, 8], [4, 1], [1, 0])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    TOTAL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    SHARES: gl.constexpr = gl.DotOperandLayout(0, TOTAL, 2)
    ELEMENT: gl.constexpr = query.dtype.element_ty

    # Values of `near`, keys of `far` are copied next; `cursor` is one block further than `far`.
    turn = gl.program_id(0) * 0
    item = gl.program_id(0)
    _copy_query(query, plan, items, item, queries, query_stride_h, query_stride_n, q_buffer, q_ready, PART, SHAPE, COPY)
    cursor = _cursor(plan, items, turn)
    near, at = _rows(index, capacity, keys, cursor, PART, COPY)
    near_group = cursor[3]
    _gather_keys(
        key, key_stride_h, weights, k_buffer, w_buffer, k_ready, 0, near_group, near, at, PART, KEY_STRIDE, COPY,
        SAMPLED,
    )  # fmt: skip
    _gather_values(value, value_stride_h, v_buffer, v_ready, 0, near_group, near, PART, VALUE_STRIDE, COPY)
    cursor = _advance(plan, items, cursor)
    near, at = _rows(index, capacity, keys, cursor, PART, COPY)
    near_group = cursor[3]
    _gather_keys(
        key, key_stride_h, weights, k_buffer, w_buffer, k_ready, 1, near_group, near, at, PART, KEY_STRIDE, COPY,
        SAMPLED,
    )  # fmt: skip
    cursor = _advance(plan, items, cursor)
    far, at = _rows(index, capacity, keys, cursor, PART, COPY)
    far_group = cursor[3]
    cursor = _advance(plan, items, cursor)

    # Slots, and how often they were used modulo 2, of this block, the one before it and the one before that.
    slot, phase = turn * 0, turn * 0
    slot1, phase1 = slot + 2, phase + 1
    slot2, phase2 = slot + 1, phase + 1
    maximum = gl.full([HALF], float("-inf"), gl.float32, ROW)
    mass = gl.zeros([HALF], gl.float32, ROW)
    total = gl.zeros([HALF, DV], gl.float32, TOTAL)
    shares = gl.zeros([HALF, BLOCK_N], ELEMENT, SHARES)
    done = turn - 1
    state = (maximum, mass, total, shares)
    copies = (cursor, near, near_group, far, far_group, at, slot, phase, slot1, phase1, slot2, phase2)
    while item < items:
        _, _, listed, low, end = _keys(plan, items, item)
        blocks = _blocks(listed, low, end)
        masked = _masked_blocks(listed, blocks)
        mbarrier.wait(q_ready.index(PART), turn % 2)
        for block in range(masked):
            spans = (listed, low, end, (block + blocks - masked) * BLOCK_N)
            state, copies = _attend_block(
                state, copies, block, spans, item, done, turn,
                query, key, value, index, weights, plan, output, lse, visited,
                query_stride_h, query_stride_n, key_stride_h, value_stride_h, output_stride_h, output_stride_n,
                queries, keys, tiles, heads, offset, capacity, items, unit,
                q_buffer, k_buffer, v_buffer, w_buffer, q_ready, k_ready, k_free, v_ready, v_free,
                PART, SHAPE, CAUSAL, SAMPLED, KEY_STRIDE, VALUE_STRIDE, COPY, LOGITS, TOTAL, True,
            )  # fmt: skip
        for block in range(masked, blocks):
            state, copies = _attend_block(
                state, copies, block, None, item, done, turn,
                query, key, value, index, weights, plan, output, lse, visited,
                query_stride_h, query_stride_n, key_stride_h, value_stride_h, output_stride_h, output_stride_n,
                queries, keys, tiles, heads, offset, capacity, items, unit,
                q_buffer, k_buffer, v_buffer, w_buffer, q_ready, k_ready, k_free, v_ready, v_free,
                PART, SHAPE, CAUSAL, SAMPLED, KEY_STRIDE, VALUE_STRIDE, COPY, LOGITS, TOTAL, False,
            )  # fmt: skip
        done = item
        turn += 1
        item += gl.num_programs(0)
        _copy_query(
            query, plan, items, item, queries, query_stride_h, query_stride_n, q_buffer, q_ready, PART, SHAPE, COPY
        )

    maximum, mass, total, shares = state
    slot1, phase1 = copies[8], copies[9]
    mbarrier.wait(v_ready.index(slot1), phase1)
    total = warpgroup_mma(shares, v_buffer.index(slot1), total, is_async=True)
    total = warpgroup_mma_wait(0, deps=[total])
    _store(
        total, maximum, mass, output, lse, visited, plan, items, done, queries, tiles, heads, output_stride_h,
        output_stride_n, unit, PART, SHAPE, SAMPLED, LOGITS, TOTAL,
    )  # fmt: skip
    # The last copies, of keys that nobody wants, must not outlive the program.
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=["queries", "keys", "tiles", "heads", "offset", "items"])
def attend_hopper_kernel(
    query,
    key,
    value,
    index,
    weights,
    plan,
    output,
    lse,
    visited,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    key_stride_b,
    key_stride_h,
    value_stride_b,
    value_stride_h,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    queries,
    keys,
    tiles,
    heads,
    offset,
    capacity,
    items,
    scale,
    TILE: gl.constexpr,
    HEADS: gl.constexpr,
    CAUSAL: gl.constexpr,
    SAMPLED: gl.constexpr,
    KEY_STRIDE: gl.constexpr,
    VALUE_STRIDE: gl.constexpr,
    D: gl.constexpr,
    DV: gl.constexpr,
):
    """Attend the `items` of a batch entry, which `plan_kernel` lists: TILE positions of HEADS heads that share a list.

    `index` and `weights` [lists, capacity] as `select_kernel` writes them, `capacity` a multiple of 128. Program (first
    of its items; batch entry).
    """
    ELEMENT: gl.constexpr = query.dtype.element_ty
    SHAPE: gl.constexpr = (TILE, HEADS)
    unit = gl.maximum(gl.to_tensor(scale).to(gl.float32), 1e-30)
    batch = gl.program_id(1).to(gl.int64)
    query += batch * query_stride_b
    key += batch * key_stride_b
    value += batch * value_stride_b
    output += batch * output_stride_b
    plan += batch * items * FIELDS
    q_buffer = gl.allocate_shared_memory(
        ELEMENT, [2, HALF, D], gl.NVMMASharedLayout.get_default_for([HALF, D], ELEMENT)
    )
    k_buffer = gl.allocate_shared_memory(
        ELEMENT, [STAGES, BLOCK_N, D], gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], ELEMENT)
    )
    v_buffer = gl.allocate_shared_memory(
        ELEMENT, [STAGES, BLOCK_N, DV], gl.NVMMASharedLayout.get_default_for([BLOCK_N, DV], ELEMENT)
    )
    w_buffer = k_buffer
    if SAMPLED:
        PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        w_buffer = gl.allocate_shared_memory(weights.dtype.element_ty, [STAGES, BLOCK_N], PLAIN)
    q_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(q_ready.index(part), count=128)
    for stage in gl.static_range(STAGES):
        # Every thread of both partitions tells when its copies have arrived, one of each that its products are done.
        mbarrier.init(k_ready.index(stage), count=256)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=256)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize([
        (_attend, (
            0, query, key, value, index, weights, plan, output, lse, visited,
            query_stride_h, query_stride_n, key_stride_h, value_stride_h, output_stride_h, output_stride_n,
            queries, keys, tiles, heads, offset, capacity, items, unit,
            q_buffer, k_buffer, v_buffer, w_buffer, q_ready, k_ready, k_free, v_ready, v_free,
            SHAPE, CAUSAL, SAMPLED, KEY_STRIDE, VALUE_STRIDE, DV,
        )),
        (_attend, (
            1, query, key, value, index, weights, plan, output, lse, visited,
            query_stride_h, query_stride_n, key_stride_h, value_stride_h, output_stride_h, output_stride_n,
            queries, keys, tiles, heads, offset, capacity, items, unit,
            q_buffer, k_buffer, v_buffer, w_buffer, q_ready, k_ready, k_free, v_ready, v_free,
            SHAPE, CAUSAL, SAMPLED, KEY_STRIDE, VALUE_STRIDE, DV,
        )),
    ], [4], [REGISTERS])  # fmt: skip
