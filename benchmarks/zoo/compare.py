"""Calls a model with its attention rewritten and without, and notes what happened to each attention site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.passes import Decision, rewrite

from .architectures import Architecture
from .inputs import real_positions, scenario_inputs

EXACT = S2OConfig(min_length=0, threshold=0, ranking=Ranking(rule="dropped", segment=16, near_keys=0))
"""Takes the sparse path at any length and visits every key."""


@dataclass
class Recorder:
    """A backend that rewrites graphs, runs them eagerly, and keeps the decisions of each graph each time it runs."""

    decisions: list[Decision] = field(default_factory=list)
    __name__ = "s2o_zoo"

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        decisions = rewrite(module, EXACT)

        def run(*args: Any) -> Any:
            self.decisions += decisions
            return module(*args)

        return run


@dataclass(frozen=True)
class Outcome:
    """What a backend did to one call of a model.

    Attributes:
        expected: How many attentions the call computes.
        decisions: One for each attention that was found.
        difference: Of the outputs with and without the backend, the largest, relative to the largest output.
    """

    expected: int
    decisions: list[Decision]
    difference: float

    @property
    def refused(self) -> list[Decision]:
        """The sites that stayed as they were."""
        return [decision for decision in self.decisions if not decision.rewritten]


def examine(architecture: Architecture, implementation: str, scenario: str) -> Outcome:
    """Call a model with its attention rewritten and without."""
    recorder = Recorder()
    difference = compare(architecture, implementation, scenario, recorder)
    return Outcome(architecture.expected_sites(scenario), recorder.decisions, difference)


@torch.no_grad()
def compare(architecture: Architecture, implementation: str, scenario: str, backend: Any) -> float:
    """The largest difference that a backend makes to a model's output, relative to the largest output."""
    torch._dynamo.reset()
    model = architecture.build(implementation)
    inputs = architecture.inputs()
    compiled = torch.compile(model, backend=backend, dynamic=False)
    arguments = [scenario_inputs(model, inputs, scenario) for _ in range(2)]
    expected, actual = (call(**given)[0] for call, given in zip((model, compiled), arguments, strict=True))
    real = real_positions(model, arguments[0], expected)
    return float((actual - expected)[real].abs().max() / expected[real].abs().max())
