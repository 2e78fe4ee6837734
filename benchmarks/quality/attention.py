"""The attention of one layer by each method, and the work that it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.ops import S2OConfig

from ..baselines import flexprefill, pbs, streaming, vertical_slash, xattention
from ..baselines.visit import Visit
from ..captured import Layer
from ..judge import dense_flops
from ..methods import Rule, operator_attention, ranking_flops


class Attended(NamedTuple):
    """What a layer's attention gives.

    Attributes:
        output: [Hq, L, Dv].
        density: Visited pairs over those of a dense kernel.
        ranking: FLOPs of the ranking's products over those of dense attention.
    """

    output: torch.Tensor
    density: float
    ranking: float


Attention = Callable[[Layer], Attended]


def attend_densely(layer: Layer) -> Attended:
    """All earlier keys, by SDPA."""
    query, key, value = (x[None] for x in (layer.query, layer.key, layer.value))
    output = scaled_dot_product_attention(query, key, value, is_causal=True, scale=layer.scale, enable_gqa=True)
    return Attended(output[0], 1.0, 0.0)


def attend_by_operator(config: S2OConfig, layer: Layer) -> Attended:
    """The operator."""
    result, density = operator_attention(config, layer)
    return Attended(result.output[0], density, ranking_flops(layer, config) / dense_flops(layer))


def attend_by_rule(rule: Rule, setting: float, layer: Layer) -> Attended:
    """A rule of others at one setting of its dial, choosing in float32 and applied exactly: other keys are masked."""
    exact = dataclasses.replace(layer, query=layer.query.float(), key=layer.key.float())
    visits: list[Visit] = []
    for head in range(layer.heads):
        visits += rule(*exact.head(head)[:2], layer.scale, (setting,))
    densities = [visit.density(layer.length) for visit in visits]
    ranking = sum(visit.ranking for visit in visits)
    return Attended(attend_visits(layer, visits), sum(densities) / len(densities), ranking / dense_flops(layer))


def attend_visits(layer: Layer, visits: list[Visit], room: int = 2**30) -> torch.Tensor:
    """Attention over what each head visits: [Hq, L, Dv].

    Some tiles of all heads at a time, so many that masks have no more than `room` elements; the tile is that of the
    rule, the same for all heads.
    """
    size = visits[0].tile
    tiles = max(1, room // (layer.heads * size * layer.length))
    positions = torch.arange(layer.length, device=layer.key.device)
    outputs = []
    for first in range(0, layer.length, tiles * size):
        rows = positions[first : first + tiles * size]
        end = first + len(rows)
        some = slice(first // size, first // size + tiles)
        seen = torch.stack([visit.seen(some, layer.length)[:, :end] for visit in visits])
        mask = seen.repeat_interleave(size, dim=1)[:, : len(rows)] & (positions[:end] <= rows[:, None])
        query, key, value = layer.query[:, first:end], layer.key[:, :end], layer.value[:, :end]
        outputs.append(
            scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=mask[None], scale=layer.scale, enable_gqa=True
            )[0]
        )
    return torch.cat(outputs, dim=1)


def operator(config: S2OConfig) -> Attention:
    """The method of the operator at a setting; `min_length` must be 0, as calls that run dense are not counted."""
    return partial(attend_by_operator, config)


def rule(function: Rule, setting: float) -> Attention:
    """The method of a rule at one setting of its dial."""
    return partial(attend_by_rule, function, setting)


DENSE = "dense"
METHODS: dict[str, Attention] = {
    "s2o": operator(S2OConfig(min_length=0)),
    "XAttention": rule(xattention.xattention, xattention.THRESHOLD),
    "PBS-Attn": rule(pbs.pbs, pbs.THRESHOLD),
    "FlexPrefill": rule(flexprefill.flexprefill, flexprefill.COVERAGE),
    "S2O as published": operator(S2OConfig.paper(min_length=0)),
    "vertical-slash": rule(vertical_slash.vertical_slash, 1),
    "StreamingLLM": rule(streaming.streaming, streaming.WINDOW),
}
"""By name, each at its default setting."""
COMPARED = ("s2o", "XAttention", "PBS-Attn", "FlexPrefill")
"""What is compared with dense attention by default."""
