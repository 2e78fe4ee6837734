"""The calls of attention that a model makes, by site, and what sparse attention would make of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .._explain import call_once, replace_operator
from ..ops import AttentionResult, Ranking, S2OConfig
from ..ops.density import density, ranking_share, share_in_all_channels, share_of_guides
from ..ops.dispatch import DENSE_AT_ANY_LENGTH
from ..ops.visibility import Visibility
from ..passes import Decision, rewrite
from ..passes.safety import Safeguard


@dataclass(frozen=True)
class Measurement:
    """What a threshold does to a call.

    Attributes:
        threshold: The threshold.
        density: Visited (query, key) pairs over those that a dense kernel visits.
        error: sum |o - o_dense|^2 / sum |o_dense|^2 over all queries, heads and sequences.
    """

    threshold: float
    density: float
    error: float


@dataclass(frozen=True)
class SiteInputs:
    """A call of the operator at a site.

    Attributes:
        site: The name of the site.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        options: The operator's other arguments, as keywords.
    """

    site: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]

    @functools.cached_property
    def dense(self) -> torch.Tensor:
        """The output of dense attention, in the dtype of the call."""
        options = self.options | {"min_length": DENSE_AT_ANY_LENGTH}
        return torch.ops.s2o.attention(self.query, self.key, self.value, **options)

    def sparse(self, threshold: float) -> AttentionResult:
        """Sparse attention, whatever the length."""
        options = self.options | {"min_length": 0, "threshold": threshold}
        return AttentionResult(*torch.ops.s2o.attention_stats(self.query, self.key, self.value, **options))

    def measure(self, threshold: float) -> Measurement:
        """Compare sparse with dense attention."""
        result, dense = self.sparse(threshold), self.dense.float()
        error = (result.output.float() - dense).square().sum() / dense.square().sum()
        return Measurement(threshold, self.density(result).mean().item(), error.item())

    def density(self, result: AttentionResult) -> torch.Tensor:
        """Visited pairs over those that a dense kernel visits, by sequence and head: [B, Hq]."""
        options, lengths = self.options, (self.query.shape[2], self.key.shape[2])
        mask = options["is_causal"], options["causal_offset"]
        return density(
            result.visited, *lengths, *mask, Ranking.from_json(options["settings"]).tile, options.get("window")
        )

    def ranking_share(self, config: S2OConfig) -> float:
        """What ranking the keys costs, over what dense attention costs."""
        size, group_size = self.query.shape[3], self.query.shape[1] // self.key.shape[1]
        terms = Visibility(**{name: self.options[name] for name in Visibility._fields if name in self.options})
        config = terms.effective_config(config, self.key.shape[2])
        whole = config.with_ranking(channels=None)
        few, all_channels = (ranking_share(rule, size, self.value.shape[3], group_size) for rule in (config, whole))
        scale = self.options.get("scale")
        scale = size**-0.5 if scale is None else scale
        in_all = share_in_all_channels(self.query, self.key, scale, config)
        return (few + (all_channels - few) * in_all) * share_of_guides(self.query, self.key, scale, config)


def visit_sites(
    model: torch.nn.Module,
    arguments: Mapping[str, Any] | tuple[Any, ...],
    config: S2OConfig,
    handle: Callable[[SiteInputs], None],
    found: Callable[[list[Decision]], None],
) -> None:
    """Call a model once, under ``torch.no_grad()``; all its attention runs dense, and none is too short to count.

    Args:
        model: The model.
        arguments: Its keyword or positional arguments.
        config: Settings of sparse attention.
        handle: Called with each call of a site that is proven safe.
        found: Called with what was decided of the sites of each graph, before it runs.
    """

    def implementation(decision: Decision) -> Callable[..., torch.Tensor]:
        def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
            call = SiteInputs(decision.name, query, key, value, options)
            handle(call)
            return call.dense

        return attention

    def backend(module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        forced = dataclasses.replace(config, min_length=0)
        found(Safeguard(module).run(lambda: rewrite(module, forced), list))
        replace_operator(module, implementation)
        return module.forward

    if isinstance(arguments, Mapping):
        call_once(model, backend, **arguments)
    else:
        call_once(model, backend, *arguments)
