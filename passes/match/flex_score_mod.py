"""Reads the score_mod of a flex_attention call: what it multiplies, caps and masks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean
from torch.fx import Graph, Node

from ..graph.node_values import number
from ..graph.operations import Filled, Same, Scaled, Sum, Tanh
from ..graph.read_operations import read_operation
from ..mask.expressions import Choice, Unreadable, is_predicate, where
from ..mask.reader import Reader
from ..mask.refused import Refused

_CONTENT = (
    "the score_mod adds or multiplies something that depends on positions, on tensors or on the score itself, such as "
    "ALiBi or relative positions; only factors, a tanh soft-cap and masks with -inf can be proven"
)


@dataclass(frozen=True)
class ModifiedScore:
    """A score times `factor`, or ``factor * tanh(score * inner)``, where `visible` holds, and -inf elsewhere.

    Attributes:
        factor: Not zero.
        inner: Not zero; None without a tanh.
        visible: A predicate.
        is_shifted: Whether a number was added that a softmax takes out again.
    """

    factor: float = 1.0
    inner: float | None = None
    visible: Boolean = sympy.true
    is_shifted: bool = False

    def scaled(self, factor: float) -> ModifiedScore:
        """The same times a number."""
        if factor == 0 or not math.isfinite(factor):
            raise Refused(f"the score_mod scales scores by {factor}; use another number")
        if factor < 0 and self.visible != sympy.true:
            raise Refused("the score_mod negates masked scores; mask them afterwards")
        return replace(self, factor=self.factor * factor)

    def capped(self) -> ModifiedScore:
        """The tanh of the same."""
        if self.inner is not None or self.is_shifted or self.visible != sympy.true:
            raise Refused("the score_mod caps scores by tanh after more than scaling; mask them afterwards")
        return ModifiedScore(inner=self.factor)

    def masked(self, visible: Boolean) -> ModifiedScore:
        """The same where a predicate holds."""
        return replace(self, visible=sympy.And(self.visible, visible))


class ScoreModWalk:
    """Walks from the result of a score_mod to the score that it is given, the first argument of its graph."""

    def __init__(self, graph: Graph, reader: Reader) -> None:
        self.reader = reader
        self.score = next(iter(graph.nodes))
        self.modified = {self.score}
        for node in graph.nodes:
            if not self.modified.isdisjoint(node.all_input_nodes):
                self.modified.add(node)

    def find(self, node: Node) -> ModifiedScore:
        """The score as a node has modified it.

        Raises:
            Refused: Something that the operator cannot.
            Unreadable: A mask on the way cannot be read.
        """
        if node is self.score:
            return ModifiedScore()
        operation = read_operation(node)
        if isinstance(operation, Same):
            return self.find(operation.source)
        if isinstance(operation, Tanh):
            return self.find(operation.source).capped()
        if isinstance(operation, Scaled):
            return self._scaled(operation)
        if isinstance(operation, Sum):
            return self._sum(operation)
        if isinstance(operation, Filled):
            return self._filled(operation)
        raise Refused(_CONTENT)

    def _scaled(self, scaled: Scaled) -> ModifiedScore:
        score, other = self._sides(scaled.source, scaled.factor, commute=not scaled.inverted)
        factor = self._number(other)
        return self.find(score).scaled(1 / factor if scaled.inverted and factor else factor)

    def _sum(self, total: Sum) -> ModifiedScore:
        score, other = self._sides(total.left, total.right, commute=total.sign == 1)
        choice = self._choice(other)
        added = [total.sign * float(value) for value in choice.values]
        if choice.predicate == sympy.true and math.isfinite(added[0]):
            return replace(self.find(score), is_shifted=True)
        if not all(value in (0, -math.inf) for value in added):
            raise Refused(_CONTENT)
        return self.find(score).masked(where(choice, lambda value: value == 0))

    def _filled(self, filled: Filled) -> ModifiedScore:
        score, other = self._sides(filled.source, filled.value)
        keep = filled.keep is (score is filled.source)
        if self._number(other) != -math.inf:
            raise Refused("the score_mod fills scores with another number than -inf; use -inf to hide a key")
        predicate = self.reader.read(filled.mask).expression
        if not is_predicate(predicate):
            raise Unreadable(f"{filled.mask.name} is not boolean")
        return self.find(score).masked(predicate if keep else sympy.Not(predicate))

    def _sides(self, first: Any, second: Any, commute: bool = True) -> tuple[Node, Any]:
        """The operand that is made from the score, and the other, which is not."""
        for score, other in ((first, second), (second, first))[: 1 + commute]:
            if score in self.modified and other not in self.modified:
                return score, other
        raise Refused(_CONTENT)

    def _number(self, value: Any) -> float:
        """The number that an operand is."""
        choice = self._choice(value)
        if choice.predicate != sympy.true:
            raise Refused(_CONTENT)
        return float(choice.values[0])

    def _choice(self, value: Any) -> Choice:
        """The two numbers of which an operand is made, also where they are one."""
        known = number(value)
        if isinstance(known, Node):
            raise Refused("the score_mod uses a number that is only known while the model runs; use a constant")
        try:
            return self.reader.choice(value if known is None else known, ())
        except Unreadable:
            raise Refused(_CONTENT) from None
