"""The methods that the frontier compares: the operator, the rules of others, and oracles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from s2o_compile.ops import AttentionResult, Ranking, S2OConfig
from s2o_compile.ops.density import density, scored_channels, share_in_all_channels, share_of_guides
from s2o_compile.ops.geometry import Geometry
from s2o_compile.ops.rule.output_weighting import sampled_rows
from s2o_compile.ops.visibility import Visibility

from .baselines import (
    flashprefill,
    flashprefill_v2,
    flexprefill,
    pbs,
    prism,
    quoka,
    stem,
    streaming,
    vertical_slash,
    xattention,
)
from .baselines.group import Group, GroupRule, Rule, by_head
from .baselines.oracle import oracle
from .baselines.pooled_blocks import pooled_blocks
from .captured import Layer
from .judge import Judge, Loss, Score


@dataclass(frozen=True)
class Method:
    """A method, and the sweep of its dial.

    Attributes:
        scores: Scores a layer at each of some settings of the dial.
        dial: What the dial is.
        settings: The sweep.
        default: The published setting, or the project's; None where there is none.
    """

    scores: Callable[[Judge, Sequence[float]], list[Score]]
    dial: str
    settings: tuple[float, ...]
    default: float | None = None


def rule_scores(rule: GroupRule, judge: Judge, settings: Sequence[float]) -> list[Score]:
    """Scores of a rule that chooses what each head visits."""
    layer = judge.layer
    losses: list[list[Loss]] = [[] for _ in settings]
    densities, ranking = [0.0] * len(settings), [0.0] * len(settings)
    for index in range(len(layer.key)):
        group = Group(*layer.group(index), layer.scale)
        for place, visits in enumerate(rule(group, settings)):
            for head, visit in enumerate(visits, index * len(visits)):
                losses[place].append(judge.loss(head, *judge.attend(head, visit)))
                densities[place] += visit.density(layer.length) / layer.heads
                ranking[place] += visit.ranking
    return [judge.score(*parts) for parts in zip(losses, densities, ranking, strict=True)]


def operator_scores(config: S2OConfig, judge: Judge, settings: Sequence[float]) -> list[Score]:
    """Scores of the operator, with the threshold as its dial."""
    layer = judge.layer
    scores = []
    for threshold in settings:
        chosen = dataclasses.replace(config, threshold=threshold, min_length=0)
        result = operator_attention(chosen, layer.scale, *(x[None] for x in (layer.query, layer.key, layer.value)))
        share = operator_density(chosen, layer, result)
        output, lse = (x[0, :, judge.judged].float() for x in (result.output, result.lse))
        losses = [judge.loss(head, output[head], lse[head]) for head in range(layer.heads)]
        scores.append(judge.score(losses, share, ranking_flops(layer, chosen)))
    return scores


def operator_attention(
    config: S2OConfig, scale: float, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> AttentionResult:
    """What the operator gives, causally."""
    arguments = config.arguments()
    return AttentionResult(*torch.ops.s2o.attention_stats(query, key, value, is_causal=True, scale=scale, **arguments))


def operator_density(config: S2OConfig, layer: Layer, result: AttentionResult) -> float:
    """The density of what the operator gave for a layer."""
    return float(density(result.visited, layer.length, layer.length, True, 0, config.ranking.tile).mean())


def ranking_flops(layer: Layer, config: S2OConfig) -> float:
    """FLOPs that rank keys: the scores, the sample that estimates log-sum-exps, and the one that estimates outputs."""
    if not config.threshold:
        return 0.0  # every key is visited
    geometry = Geometry.of(layer.query[None], layer.key[None], Visibility(is_causal=True), config)
    heads = layer.heads if config.ranking.guides == "head" else len(layer.key)
    scored = 0
    for segment in range(geometry.ranked_segments):
        queries = min(config.ranking.segment, layer.length - segment * config.ranking.segment)
        scored += -(-queries // config.ranking.pool) * geometry.span(segment).low
    whole, few = (scored_channels(x, layer.key.shape[-1]) for x in (config.with_ranking(channels=None), config))
    in_all = share_in_all_channels(layer.query, layer.key, layer.scale, config)
    left = share_of_guides(layer.query[None], layer.key[None], layer.scale, config)
    flops = 2.0 * heads * scored * left * (few + (whole - few) * in_all)
    if config.ranking.measure == "output":
        rows = layer.heads * len(sampled_rows(layer.length, layer.heads // len(layer.key), layer.key.device))
        flops += 2.0 * rows * layer.length * (layer.key.shape[-1] + layer.value.shape[-1])
    return flops


def rule(function: Rule, dial: str, settings: tuple[float, ...], default: float | None = None) -> Method:
    """A method of a rule of single heads."""
    return group_rule(by_head(function), dial, settings, default)


def group_rule(function: GroupRule, dial: str, settings: tuple[float, ...], default: float | None = None) -> Method:
    """A method of a rule of the query heads of a KV head."""
    return Method(partial(rule_scores, function), dial, settings, default)


def operator(config: S2OConfig, settings: tuple[float, ...], default: float | None = None) -> Method:
    """A method of the operator."""
    return Method(partial(operator_scores, config), "threshold", settings, default)


ALPHAS = (0.3, 0.1, 0.08, 0.02, 5e-3)
COVERED = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
PACKED_MEANS = S2OConfig.fast().with_ranking(rule="means", near_keys=128)
LEAST_WORK = S2OConfig(ranking=Ranking(pool=4, channels=64, lists="head", sample=64, measure="output"))

METHODS: dict[str, Method] = {
    "s2o": operator(S2OConfig(), (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128), S2OConfig().threshold),
    "s2o, packed": operator(PACKED_MEANS, (1e-5, 2e-5, 4e-5, 1e-4, 3e-4, 1e-3)),
    "s2o, least work": operator(LEAST_WORK, (2e-3, 4e-3, 6e-3, 8e-3, 1.6e-2, 3.2e-2)),
    "S2O as published": operator(S2OConfig.paper(), (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), S2OConfig.paper().threshold),
    "PBS-Attn": rule(pbs.pbs, "covers", COVERED, pbs.THRESHOLD),
    "XAttention, stride 8": rule(xattention.xattention, "covers", COVERED, xattention.THRESHOLD),
    "XAttention, stride 16": rule(partial(xattention.xattention, stride=16), "covers", COVERED, xattention.THRESHOLD),
    "FlexPrefill": rule(flexprefill.flexprefill, "gamma", COVERED, flexprefill.COVERAGE),
    "FlashPrefill": rule(flashprefill.flashprefill, "alpha", ALPHAS, flashprefill.ALPHA),
    "FlashPrefill V2": group_rule(flashprefill_v2.flashprefill_v2, "alpha", ALPHAS, flashprefill_v2.THRESHOLD),
    "Stem": group_rule(stem.stem, "keeps", (0.05, 0.1, 0.2, 0.4), stem.KEPT),
    "Prism": rule(prism.prism, "covers", COVERED, prism.THRESHOLD),
    "QuoKA": group_rule(quoka.quoka, "keeps", (0.03, 0.06, 0.12, 0.25, 0.5), quoka.KEPT),
    "vertical-slash": rule(vertical_slash.vertical_slash, "budgets", (0.0625, 0.125, 0.25, 0.5, 1), 1),
    "mean-pooled blocks": rule(pooled_blocks, "covers", COVERED),
    "StreamingLLM": rule(streaming.streaming, "window", (512, 1020, 2048, 4096, 8192), streaming.WINDOW),
    "oracle, blocks of 128": rule(partial(oracle, tile=128, block=128), "probability", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)),
    "oracle, single keys": rule(oracle, "probability", (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)),
}
"""By name; what is compared by default."""
