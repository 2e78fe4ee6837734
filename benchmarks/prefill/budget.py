"""How much of the attention a model's prefill visits, and the threshold that makes it visit a given share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from s2o_compile._attention import attention
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.density import dense_pairs
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept

from ..density import find, sampled_density

SHARPEST = 7.0
"""The least threshold that is tried, as the negative of its logarithm to base 10."""


def with_density(model: Any, inputs: dict[str, Any], config: S2OConfig, density: float) -> S2OConfig:
    """The settings with the threshold at which the layer in the middle of a model visits about this density.

    Raises:
        UsageError: Attention has a mask tensor or dropout.
    """
    middle = model.config.get_text_config().num_hidden_layers // 2
    kept: list[SdpaInputs] = []

    def keep(call: SdpaInputs) -> torch.Tensor:
        _check_plain(call)
        if call.index == middle:
            kept.append(call)
        return call.dense()

    with torch.no_grad(), SdpaIntercept(keep):
        model(**inputs)
    call = kept[0]

    def at(exponent: float) -> S2OConfig:
        return dataclasses.replace(config, threshold=10**-exponent)

    def density_at(exponent: float) -> float:
        return sampled_density(
            lambda rows: call.query[:, :, rows], call.key, call.value, call.is_causal, at(exponent), call.scale
        )

    return at(find(density_at, density, 0, SHARPEST))


def visited_density(model: Any, inputs: dict[str, Any], config: S2OConfig) -> float:
    """The density of all attention calls of a prefill, by calling the operator for each of them; not compiled.

    Raises:
        UsageError: Attention has a mask tensor or dropout.
    """
    visited = pairs = 0

    def attend(call: SdpaInputs) -> torch.Tensor:
        nonlocal visited, pairs
        _check_plain(call)
        result = attention(
            call.query, call.key, call.value, call.is_causal, scale=call.scale, config=config, return_stats=True
        )
        lengths = call.query.shape[2], call.key.shape[2]
        visited += int(result.visited.sum())
        pairs += call.query.shape[:2].numel() * dense_pairs(*lengths, call.is_causal, 0, config.ranking.tile)
        return result.output

    with torch.no_grad(), SdpaIntercept(attend):
        model(**inputs)
    return visited / pairs


def _check_plain(call: SdpaInputs) -> None:
    if not call.is_plain:
        raise UsageError(f"Layer {call.index} of this model attends with a mask or dropout, which is not measured.")
