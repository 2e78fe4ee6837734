"""Attention over what a query head visits, on a GPU: only visited keys are read, and no mask of all pairs is made."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from s2o_compile.ops.kernels.arguments import padded
from s2o_compile.ops.kernels.attend import add_keys
from s2o_compile.ops.kernels.helpers import finite_or_zero, float32, load_rows
from s2o_compile.ops.kernels.launch import launch
from s2o_compile.ops.kernels.tiling import attend_tiling, shared_memory

from .blocks import pool
from .visit import Visit

LOG2_E, LN_2 = math.log2(math.e), math.log(2)


def attend_visit(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visit: Visit
) -> torch.Tensor:
    """Causal attention of a query head over the keys, and the means, that its tiles visit: [L, Dv].

    Args:
        query: [L, D].
        key: [L, D].
        value: [L, Dv].
        scale: Factor of the logits, above 0.
        visit: Every query sees a key.
    """
    output, lse = _attend(query, key, value, scale, visit, is_means=False)
    if visit.means is None:
        return output
    mean_key, mean_value = (pool(x.float(), visit.block).to(x.dtype) for x in (key, value))
    of_means, lse_of_means = _attend(query, mean_key, mean_value, scale, visit, is_means=True)
    share = torch.sigmoid(lse_of_means + math.log(visit.block) - lse)[:, None]
    return torch.lerp(output.float(), of_means.float(), share).to(output.dtype)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, visit: Visit, *, is_means: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the visited keys, or over visited means, of which all queries see all: output and log-sum-exp.

    Queries that see nothing have zeros, and a log-sum-exp [L], float32, of -inf.
    """
    mask = visit.means if is_means else visit.mask
    assert mask is not None
    first = pad(mask.sum(-1).cumsum(0), (1, 0))
    listed = mask.nonzero()[:, 1].int()
    order = None if visit.order is None else visit.order.int()
    output, lse = query.new_empty(len(query), value.shape[1]), query.new_empty(len(query), dtype=torch.float32)
    widest, shared = max(key.shape[1], value.shape[1]), shared_memory(query.device)
    # In two stages Triton 3.6 loads wrong rows of blocks that are listed by one number (docs/notes/kernels.md).
    launch(
        visit_kernel, (len(mask),),
        query, key, value, listed, first, order, output, lse,
        query.stride(0), len(query), len(key), scale * LOG2_E,
        KEY_STRIDE=key.stride(0), VALUE_STRIDE=value.stride(0), CAUSAL=not is_means,
        TILE=visit.tile, BLOCK=1 if is_means else visit.block, LN_2=LN_2,
        D=key.shape[1], BLOCK_D=padded(key.shape[1]), DV=value.shape[1], BLOCK_DV=padded(value.shape[1]),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        **attend_tiling(widest, key.element_size(), visit.tile, False, shared)._replace(num_stages=1).arguments,
    )  # fmt: skip
    return output, lse


@triton.jit(do_not_specialize=("queries", "keys"))
def visit_kernel(
    query, key, value, listed, first, order, output, lse, query_stride, queries, keys, unit,
    KEY_STRIDE: tl.constexpr, VALUE_STRIDE: tl.constexpr, CAUSAL: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, LN_2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend one tile over its listed blocks, from `first` [tiles + 1] on; program (tile, last first).

    Blocks hold keys in their `order` [keys], or in that of their positions where it is None. `unit` is the logits'
    factor to base 2.
    """
    unit = float32(unit)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, lane = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    position = tile * TILE + row
    real = (row < TILE) & (position < queries)
    rows = load_rows(query, position, real, query_stride, D, BLOCK_D)
    begin = tl.load(first + tile)
    count = ((tl.load(first + tile + 1) - begin) * BLOCK).to(tl.int32)
    listed += begin
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(0, count, BLOCK_N):
        column = start + lane
        chosen = tl.load(listed + column // BLOCK, mask=column < count, other=0) * BLOCK + column % BLOCK
        inside = (column < count) & (chosen < keys)
        if order is not None:
            chosen = tl.load(order + chosen, mask=inside, other=0)
        seen = inside[None, :] & real[:, None]
        if CAUSAL:
            seen = seen & (chosen[None, :] <= position[:, None])
        maximum, mass, total = add_keys(
            maximum, mass, total, rows, key, value, chosen, inside, seen, None, None, unit, 0.0,
            KEY_STRIDE, VALUE_STRIDE, False, False, False, D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    channels = tl.arange(0, BLOCK_DV)
    pointers = output + position.to(tl.int64)[:, None] * DV + channels[None, :]
    total = total / tl.where(mass == 0, 1.0, mass)[:, None]
    tl.store(pointers, total.to(output.dtype.element_ty), mask=real[:, None] & (channels < DV)[None, :])
    tl.store(lse + position, (finite_or_zero(maximum) * unit + tl.log2(mass)) * LN_2, mask=real)
