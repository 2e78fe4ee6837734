"""The operator on a sequence that is sharded over the ranks of this process's group."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import distributed

from s2o_compile._attention import attention
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.context import Whole
from s2o_compile.ops.density import dense_pairs
from s2o_compile.ops.layout import Block, blocks_of_rank
from s2o_compile.ops.visibility import Visibility

from ..inputs import Structure
from ..speed.measure import diffuseness
from ..speed.shapes import SHAPES
from .ranks import balance, device_of_rank, medians, of_all, of_slowest, peak_mebibytes, seconds_of_ranks
from .row import OPERATOR, Case, Row


def measure_operator(case: Case, setting: float | None) -> Row:
    """The row of this group; `setting` is the diffuseness of the queries, found if it is None."""
    shape, device = SHAPES[case.shape], device_of_rank(case.device)
    config = dataclasses.replace(case.config, min_length=0)
    whole, setting = draw(case, config, setting)
    count, rank = distributed.get_world_size(), distributed.get_rank()
    blocks = blocks_of_rank(rank, count, case.length // count, case.layout, config.ranking.segment)
    query, key, value = (own_rows(x, blocks) for x in whole)
    row = Row(OPERATOR, case.length, count, case.layout if count > 1 else "", setting=setting)
    options: dict[str, Any] = {"config": config}
    if count > 1:
        options |= {"mesh": distributed.group.WORLD, "layout": case.layout}
    terms = Visibility(shape.is_causal)
    call = partial(attention, query, key, value, shape.is_causal, **options)

    def gather() -> Whole:
        whole = Whole.gathered(key, value, terms, distributed.group.WORLD, case.layout)
        whole.arrive()
        return whole

    gathered = gather()

    def attend() -> None:
        for row, position, length in blocks:
            rows = query[:, :, row : row + length]
            attention(rows, gathered.key, gathered.value, shape.is_causal, position, config=config)

    time = partial(seconds_of_ranks, device=device, repetitions=case.repetitions)
    row.seconds, row.spread = of_slowest(time(call))
    alone = medians(time(attend))
    row.attention, row.balance = max(alone), balance(alone)
    if count > 1:
        row.gather, _ = of_slowest(time(gather))
        row.exposed = row.seconds - row.attention
        row.hidden = max(0.0, row.gather - row.exposed)
        row.received = (key.numel() + value.numel()) * key.element_size() * (count - 1) / 2**30
    row.mebibytes = peak_mebibytes(call, device)
    result = attention(query, key, value, shape.is_causal, return_stats=True, **options)
    visited = of_all(float(result.visited.sum()))
    row.visited, row.density = balance(visited), sum(visited) / dense_work(case, config)
    if count > 1:
        row.difference = difference(result.output, own_rows(attention(*whole, shape.is_causal, config=config), blocks))
    return row


def draw(
    case: Case, config: S2OConfig, setting: float | None
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """Query, key and value of the whole sequence [1, H, L, D], and their diffuseness, which is found if it is None."""
    shape, device = SHAPES[case.shape], device_of_rank(case.device)
    structure = Structure.draw(case.length, shape.heads, shape.kv_heads, shape.channels, device, case.dtype)
    if setting is None:
        assert case.density is not None
        setting = diffuseness(structure, config, shape.is_causal, case.density)
    return (structure.query(setting), structure.key, structure.value), setting


def dense_work(case: Case, config: S2OConfig) -> int:
    """The pairs that dense attention of the whole sequence visits."""
    shape = SHAPES[case.shape]
    return shape.heads * dense_pairs(case.length, case.length, shape.is_causal, 0, config.ranking.tile)


def difference(output: torch.Tensor, want: torch.Tensor) -> float:
    """The relative squared difference of the outputs of all ranks, given the own part of each."""
    wrong, norm = (output.float() - want.float()).square().sum(), want.float().square().sum()
    return float(sum(of_all(float(wrong))) / sum(of_all(float(norm))))


def own_rows(x: torch.Tensor, blocks: list[Block]) -> torch.Tensor:
    """The positions of blocks of [B, H, L, D]."""
    return torch.cat([x[:, :, block.position : block.position + block.length] for block in blocks], 2)
