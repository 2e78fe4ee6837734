"""The operator on DTensors whose heads are sharded over the ranks of this process's group, as in tensor parallelism."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from torch import distributed
from torch.distributed.tensor import Shard, distribute_tensor

from s2o_compile._attention import attention

from ..speed.shapes import SHAPES
from .operator import dense_work, difference, draw
from .ranks import balance, device_of_rank, medians, of_all, of_slowest, peak_mebibytes, seconds_of_ranks
from .row import HEADS, OPERATOR, Case, Row


def measure_heads(case: Case, setting: float | None) -> Row:
    """The row of this group; `setting` is the diffuseness of the queries, found if it is None."""
    device, is_causal = device_of_rank(case.device), SHAPES[case.shape].is_causal
    config = dataclasses.replace(case.config, min_length=0)
    whole, setting = draw(case, config, setting)
    count, rank = distributed.get_world_size(), distributed.get_rank()
    mesh = distributed.device_mesh.init_device_mesh(device.type, (count,))
    query, key, value = (distribute_tensor(x, mesh, [Shard(1)]) for x in whole)
    call = partial(attention, query, key, value, is_causal, config=config)
    row = Row(OPERATOR, case.length, count, HEADS, setting=setting)
    times = seconds_of_ranks(call, device, case.repetitions)
    row.seconds, row.spread = of_slowest(times)
    alone = medians(times)
    row.attention, row.balance = max(alone), balance(alone)
    row.mebibytes = peak_mebibytes(call, device)
    result: Any = attention(query, key, value, is_causal, config=config, return_stats=True)
    output, visited = result.output.to_local(), of_all(float(result.visited.to_local().sum()))
    row.visited, row.density = balance(visited), sum(visited) / dense_work(case, config)
    row.difference = difference(output, attention(*whole, is_causal, config=config).chunk(count, 1)[rank])
    return row
