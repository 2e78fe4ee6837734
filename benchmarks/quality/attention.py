"""The attention of one layer by each method, and the work that it takes."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.ops import S2OConfig
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH
from s2o_compile.testbed.document import Document
from s2o_compile.testbed.predict import prefill_inputs, synchronize

from ..baselines import (
    flashprefill,
    flashprefill_v2,
    flexprefill,
    kascade,
    kernel,
    pbs,
    prism,
    quoka,
    stem,
    streaming,
    vertical_slash,
    xattention,
)
from ..baselines.blocks import pool
from ..baselines.group import Group, GroupRule, Rule, by_head
from ..baselines.visit import Visit
from ..capture import capture
from ..captured import Layer
from ..judge import dense_flops
from ..methods import operator_attention, operator_density, ranking_flops


class Attended(NamedTuple):
    """What a layer's attention gives.

    Attributes:
        output: [Hq, L, Dv].
        density: Visited pairs over those of a dense kernel.
        ranking: FLOPs of the ranking's products over those of dense attention.
        seconds: Of the attention, without the counting of its work; None for the rules of others, which choose in
            plain PyTorch here, unlike their own kernels.
    """

    output: torch.Tensor
    density: float
    ranking: float
    seconds: float | None = None


Attention = Callable[[Layer], Attended]
Output = TypeVar("Output")


def timed(layer: Layer, attend: Callable[..., Output]) -> tuple[Output, float]:
    """What a function makes of the query, key and value of a layer, each in a batch of one, and its seconds."""
    tensors = [x[None] for x in (layer.query, layer.key, layer.value)]
    synchronize(layer.key.device)
    start = time.perf_counter()
    output = attend(*tensors)
    synchronize(layer.key.device)
    return output, time.perf_counter() - start


def attend_densely(layer: Layer) -> Attended:
    """All earlier keys, by SDPA."""
    attend = partial(scaled_dot_product_attention, is_causal=True, scale=layer.scale, enable_gqa=True)
    output, seconds = timed(layer, attend)
    return Attended(output[0], 1.0, 0.0, seconds)


def keep_dense(layer: Layer) -> Attended:
    """All earlier keys, by the operator when it runs dense."""
    arguments = S2OConfig(min_length=DENSE_AT_ANY_LENGTH).arguments()
    output, seconds = timed(layer, partial(torch.ops.s2o.attention, is_causal=True, scale=layer.scale, **arguments))
    return Attended(output[0], 1.0, 0.0, seconds)


def attend_by_operator(config: S2OConfig, layer: Layer) -> Attended:
    """The operator."""
    result, seconds = timed(layer, partial(operator_attention, config, layer.scale))
    density = operator_density(config, layer, result)
    return Attended(result.output[0], density, ranking_flops(layer, config) / dense_flops(layer), seconds)


def attend_by_rule(rule: GroupRule, setting: float, layer: Layer) -> Attended:
    """A rule of others at one setting of its dial, choosing in float32 and applied exactly: other keys are masked."""
    exact = dataclasses.replace(layer, query=layer.query.float(), key=layer.key.float(), value=layer.value.float())
    visits: list[Visit] = []
    for index in range(len(layer.key)):
        visits += next(rule(Group(*exact.group(index), layer.scale), (setting,)))
    return _attended(layer, visits)


def _attended(layer: Layer, visits: list[Visit]) -> Attended:
    densities = [visit.density(layer.length) for visit in visits]
    ranking = sum(visit.ranking for visit in visits)
    return Attended(attend_visits(layer, visits), sum(densities) / len(densities), ranking / dense_flops(layer))


def attend_visits(layer: Layer, visits: list[Visit]) -> torch.Tensor:
    """Attention over what each head visits: [Hq, L, Dv]; on a GPU by a kernel, elsewhere by masks."""
    if not layer.key.is_cuda:
        return attend_by_masks(layer, visits)
    heads = enumerate(visits)
    return torch.stack([kernel.attend_visit(*layer.head(head), layer.scale, visit) for head, visit in heads])


def attend_by_masks(layer: Layer, visits: list[Visit], room: int = 2**24) -> torch.Tensor:
    """The same by SDPA.

    Some tiles of all heads at a time, so many that masks have no more than `room` elements: most keys that come later
    are in none. The tile is that of the rule, the same for all heads.
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
        if visits[0].means is not None:
            stand = torch.stack([visit.means[some] for visit in visits if visit.means is not None])
            stand = stand.repeat_interleave(size, dim=1)[:, : len(rows)]
            key, value, mask = _with_means(layer, visits[0].block, key, value, mask, stand)
        outputs.append(
            scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=mask[None], scale=layer.scale, enable_gqa=True
            )[0]
        )
    return torch.cat(outputs, dim=1)


def _with_means(
    layer: Layer, block: int, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, stand: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and a mask to add, with the blocks' means behind them, each for as many keys as a block has.

    `mask` [Hq, rows, keys] and `stand` [Hq, rows, blocks] say which keys and which means are seen.
    """
    key_means, value_means = (
        torch.stack([pool(head.float(), block) for head in x]).to(x.dtype) for x in (layer.key, layer.value)
    )
    bias = torch.where(torch.cat([mask, stand], dim=-1), 0.0, -torch.inf).to(key.dtype)
    bias[..., mask.shape[-1] :] += math.log(block)
    return torch.cat([key, key_means], dim=1), torch.cat([value, value_means], dim=1), bias


def operator(config: S2OConfig) -> Attention:
    """The method of the operator at a setting; `min_length` must be 0, as calls that run dense are not counted."""
    return partial(attend_by_operator, config)


def rule(function: Rule, setting: float) -> Attention:
    """The method of a rule of single heads at one setting of its dial."""
    return group_rule(by_head(function), setting)


def group_rule(function: GroupRule, setting: float) -> Attention:
    """The method of a rule of the query heads of a KV head at one setting of its dial."""
    return partial(attend_by_rule, function, setting)


def with_dense_layers(first: int, attention: Attention) -> Attention:
    """A method whose first layers attend densely."""

    def attend(layer: Layer) -> Attended:
        return (attend_densely if int(layer.facts["layer"]) < first else attention)(layer)

    return attend


class Reusing:
    """Kascade, whose layers reuse what others have chosen; it needs `prepare` for a model before its first text."""

    def __init__(self, dense_layers: int = 0) -> None:
        self._rule, self._dense_layers = kascade.Kascade(), dense_layers

    def prepare(self, model: Any, document: Document) -> None:
        """Make the plan for a model by reading a development text."""
        layers: list[Layer] = []
        capture(model, prefill_inputs(document, next(model.parameters()).device), layers.append)
        self._rule = kascade.Kascade(plan=kascade.make_plan(layers))

    def __call__(self, layer: Layer) -> Attended:
        """What a layer attends; layers come in order."""
        index = int(layer.facts["layer"])
        visits = self._rule.visits(layer, index)  # a layer that attends densely may be an anchor
        return attend_densely(layer) if index < self._dense_layers else _attended(layer, visits)


DENSE = "dense"
PRESETS = {
    "s2o": S2OConfig(min_length=0),
    "s2o, fast": S2OConfig.fast(min_length=0),
    "S2O as published": S2OConfig.paper(min_length=0),
}
"""The settings that methods of the operator stand for; those of a command line begin with those of "s2o"."""
METHODS: dict[str, Attention] = {
    "s2o": operator(PRESETS["s2o"]),
    "s2o, fast": operator(PRESETS["s2o, fast"]),
    "s2o, kept dense": keep_dense,
    "XAttention": rule(xattention.xattention, xattention.THRESHOLD),
    "PBS-Attn": rule(pbs.pbs, pbs.THRESHOLD),
    "FlexPrefill": rule(flexprefill.flexprefill, flexprefill.COVERAGE),
    "FlashPrefill": rule(flashprefill.flashprefill, flashprefill.ALPHA),
    "FlashPrefill, crutches": rule(
        partial(flashprefill.flashprefill, last_blocks=flashprefill.LAST_BLOCKS), flashprefill.ALPHA
    ),
    "FlashPrefill V2": group_rule(flashprefill_v2.flashprefill_v2, flashprefill_v2.THRESHOLD),
    "FlashPrefill V2, crutches": with_dense_layers(
        flashprefill_v2.FIRST_LAYERS,
        group_rule(
            partial(flashprefill_v2.flashprefill_v2, last_tiles=flashprefill_v2.LAST_TILES), flashprefill_v2.THRESHOLD
        ),
    ),
    "Stem": group_rule(stem.stem, stem.KEPT),
    "Stem, crutches": with_dense_layers(stem.FIRST_LAYERS, group_rule(partial(stem.stem, relaxed=True), stem.KEPT)),
    "Prism": rule(prism.prism, prism.THRESHOLD),
    "QuoKA": group_rule(quoka.quoka, quoka.KEPT),
    "Kascade": Reusing(),
    "Kascade, crutches": Reusing(kascade.FIRST_LAYERS),
    "S2O as published": operator(PRESETS["S2O as published"]),
    "vertical-slash": rule(vertical_slash.vertical_slash, 1),
    "StreamingLLM": rule(streaming.streaming, streaming.WINDOW),
}
"""By name, each at its default setting."""
COMPARED = ("s2o", "XAttention", "PBS-Attn", "FlexPrefill")
"""What is compared with dense attention by default."""
