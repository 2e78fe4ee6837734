"""Compares compiled functions with themselves uncompiled, and sees what is left of the attention in their graphs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Any

import torch
from torch.fx import GraphModule, Interpreter, Node

from .capture import Capture

ENCODER_LAYERS_NEED_A_LENGTH = torch.__version__ < "2.13"
"""Whether Dynamo leaves the inference path of nn.TransformerEncoderLayer out of graphs of dynamic lengths."""


@dataclass
class Recorded(Capture):
    """A capture that keeps the shapes that tensors had in the latest run."""

    shapes: dict[Node, tuple[int, ...]] = field(default_factory=dict)

    def __call__(self, module: GraphModule, inputs: Any) -> Callable[..., Any]:
        super().__call__(module, inputs)
        return _Recorder(module, self.shapes).run

    def over_queries_and_keys(self) -> list[str]:
        """The nodes that compute a tensor over queries and keys; sizes must be told apart by prime lengths."""
        (operator,) = self.operators()
        queries, keys = (self.shapes[node][2] for node in operator.args[:2])
        return [
            node.format_node()
            for node, shape in self.shapes.items()
            if node.op != "placeholder"
            and any(row % queries == 0 and column % keys == 0 for row, column in permutations(shape, 2))
        ]


class _Recorder(Interpreter):
    """Runs a graph and keeps the shapes of its tensors."""

    def __init__(self, module: GraphModule, shapes: dict[Node, tuple[int, ...]]) -> None:
        super().__init__(module)
        self.shapes = shapes

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def compare(function: Callable[..., Any], *calls: Sequence[Any], dynamic: bool = False, **tolerances: Any) -> Recorded:
    """Compile a function and check that each call computes what it computes uncompiled, dropout included."""
    captured = Recorded()
    compiled = torch.compile(function, backend=captured, dynamic=dynamic)
    with torch.no_grad():
        for args in calls:
            expected, result = (_seeded(run, copy.deepcopy(args)) for run in (function, compiled))
            torch.testing.assert_close(result, expected, equal_nan=True, **tolerances)
    return captured


def _seeded(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    torch.manual_seed(1)
    return function(*args)


def assert_rewritten(
    function: Callable[..., Any],
    *calls: Sequence[Any],
    mask: str | None = "everything",
    dynamic: bool = False,
    **tolerances: Any,
) -> Recorded:
    """Check that the one attention of a function is rewritten in one compilation, and `mask` is proven.

    Nothing over queries and keys may be left but a mask that is passed as it is.
    """
    captured = compare(function, *calls, dynamic=dynamic, **tolerances)
    decision = captured.only()
    assert decision.rewritten, decision.reason
    proven = re.sub(" from [^;]+", "", decision.mask)
    assert mask in (None, proven)
    assert "boolean mask" in proven or captured.over_queries_and_keys() == []
    return captured


def assert_refused(function: Callable[..., Any], *calls: Sequence[Any], reason: str, **tolerances: Any) -> None:
    """Check that the one attention of a function stays as it is, for a reason."""
    captured = compare(function, *calls, **tolerances)
    assert captured.operators() == []
    assert reason in captured.only().reason
