"""Captures the graphs that Dynamo hands to a backend, and runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.passes import Decision, rewrite

EXACT = S2OConfig(min_length=0, threshold=0, ranking=Ranking(segment=16, near_keys=0, rule="dropped"))
"""Takes the sparse path at any length and visits every key."""


@dataclass
class Capture:
    """A backend that rewrites graphs, keeps them, and runs them eagerly."""

    config: S2OConfig = EXACT
    modules: list[GraphModule] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    __name__ = "capture"

    def __call__(self, module: GraphModule, inputs: Any) -> Callable[..., Any]:
        self.decisions += rewrite(module, self.config)
        self.modules.append(module)
        return module.forward

    def nodes(self) -> list[Node]:
        return [node for module in self.modules for node in module.graph.nodes]

    def operators(self) -> list[Node]:
        return [node for node in self.nodes() if node.target is torch.ops.s2o.attention.default]

    def only(self) -> Decision:
        (decision,) = self.decisions
        return decision


def capture(
    function: Callable[..., Any], *args: Any, config: S2OConfig = EXACT, dynamic: bool = False, **kwargs: Any
) -> tuple[Capture, Any]:
    """Compile and call a function under no_grad; what was captured, and the result."""
    captured = Capture(config)
    with torch.no_grad():
        result = torch.compile(function, backend=captured, dynamic=dynamic)(*args, **kwargs)
    return captured, result


def inputs(batch: int = 2, heads: int = 2, queries: int = 20, keys: int | None = None, dim: int = 8) -> list[Any]:
    """Random query, key and value."""
    keys = queries if keys is None else keys
    return [torch.randn(batch, heads, length, dim) for length in (queries, keys, keys)]
