"""Writes what the prover read back into the graph: predicates and whole numbers as nodes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Graph, Node

from ..graph.node_values import fake_tensor, symbolic, symbolic_shape
from ..graph.torch_internals import FloorDiv, Max, Min, Mod, PythonMod
from .clauses import literal_of
from .expressions import INTEGERS

Value = int | Node
_SIZES: dict[type, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add, sympy.Mul: operator.mul, FloorDiv: operator.floordiv,
    Mod: operator.mod, PythonMod: operator.mod,
    Min: torch.sym_min, Max: torch.sym_max,
}  # fmt: skip
"""Of torch's `Mod` both operands are known to be at least zero."""


class NotComputed(Exception):
    """The graph has no node from which a size can be computed."""


def emit_size(graph: Graph, expression: sympy.Expr, before: Node) -> Value:
    """A whole number as an argument for a node: a number, or a node that computes it.

    Args:
        graph: Where nodes are inserted, at its insertion point.
        expression: Of sizes that inputs of the graph have.
        before: The nodes that come before this one may be used.

    Raises:
        NotComputed: A size of the expression occurs in no input.
    """
    if expression.is_Integer:
        return int(expression)
    for node in graph.nodes:
        if node is before:
            break
        if symbolic(node) == expression:
            return node
    if expression.is_Symbol:
        return _size_of_input(graph, expression)
    form = _SIZES.get(expression.func)
    if form is None:
        raise NotComputed
    return _folded(graph, form, [emit_size(graph, part, before) for part in expression.args])


def _size_of_input(graph: Graph, symbol: sympy.Expr) -> Node:
    for node in graph.find_nodes(op="placeholder"):
        tensor = fake_tensor(node)
        if tensor is not None and symbol in symbolic_shape(tensor):
            return graph.call_method("size", (node, symbolic_shape(tensor).index(symbol)))
    raise NotComputed


def _folded(graph: Graph, form: Callable[[Any, Any], Any], values: Iterable[Any]) -> Any:
    return reduce(lambda one, other: graph.call_function(form, (one, other)), values)


def _by_sign(expression: sympy.Expr) -> tuple[sympy.Expr, sympy.Expr]:
    """Two sums, of which the first less the second is the expression."""
    negative = [term for term in sympy.Add.make_args(expression) if term.could_extract_minus_sign()]
    less = -sympy.Add(*negative)
    return expression + less, less


class Emitter:
    """Writes expressions over `axes` as tensors with one dimension for each, of size 1 where they do not vary.

    Args:
        graph: Where nodes are inserted, at its insertion point.
        leaves: The nodes that unknown functions stand for, by the functions' names.
        axes: The index along each dimension, and its size.
        site: The node before which all is inserted.
        device: Of the tensors.
    """

    def __init__(
        self,
        graph: Graph,
        leaves: Mapping[str, Node],
        axes: Mapping[sympy.Symbol, sympy.Expr],
        site: Node,
        device: torch.device,
    ) -> None:
        self.graph, self.leaves, self.axes, self.site, self.device = graph, leaves, axes, site, device

    def predicate(self, expression: sympy.Basic) -> Node:
        """A predicate as a boolean tensor."""
        if isinstance(expression, sympy.Not):
            return self.graph.call_function(torch.logical_not, (self.predicate(expression.args[0]),))
        if isinstance(expression, (sympy.And, sympy.Or)):
            form = operator.and_ if isinstance(expression, sympy.And) else operator.or_
            found: Node = _folded(self.graph, form, map(self.predicate, expression.args))
            return found
        literal = literal_of(expression)
        if literal in (sympy.true, sympy.false):
            filled = torch.ones if literal else torch.zeros
            return self.graph.call_function(filled, ((),), {"dtype": torch.bool, "device": self.device})
        if isinstance(literal.lhs, AppliedUndef) and self._dtype(literal.lhs) not in INTEGERS:
            node = self._flag(literal.lhs)
            return node if isinstance(literal, sympy.Ne) else self.graph.call_function(torch.logical_not, (node,))
        if isinstance(literal, sympy.Ge):
            return self._at_least_zero(literal.lhs)
        form = torch.eq if isinstance(literal, sympy.Eq) else torch.ne
        left, right = _by_sign(literal.lhs)
        return self.graph.call_function(form, (self.integers(left), self._value(right)))

    def _at_least_zero(self, expression: sympy.Expr) -> Node:
        """Where a sum is at least zero; an unknown number stays alone on its side, as a sum with it might overflow."""
        known, unknown = expression.as_independent(AppliedUndef, as_Add=True)
        form = torch.ge
        if known.as_coeff_Add()[0].is_negative:
            form, known = torch.gt, known + 1
        left, right = _by_sign(unknown)
        if left == right == 0:
            left, right = _by_sign(known)
        elif right == 0:
            right = -known
        else:
            left += known
        return self.graph.call_function(form, (self.integers(left), self._value(right)))

    def integers(self, expression: sympy.Expr) -> Node:
        """Whole numbers as a tensor of int64."""
        value = self._value(expression)
        if isinstance(value, Node) and self._varies(expression):
            return value
        return self.graph.call_function(
            torch.full, ([1] * len(self.axes), value), {"dtype": torch.int64, "device": self.device}
        )

    def leaf(self, term: AppliedUndef) -> Node:
        """A leaf at its indices."""
        node = self.leaves[term.func.__name__]
        tensor = fake_tensor(node)
        assert tensor is not None
        if not term.args:
            return self._index(node, (None,) * len(self.axes))
        places = [self._place(index, size) for index, size in zip(term.args, symbolic_shape(tensor), strict=True)]
        kept = [symbol for symbol, _ in places if symbol is not None]
        if None in (item for _, item in places) or kept != [symbol for symbol in self.axes if symbol in kept]:
            return self._index(node, tuple(map(self._value, term.args)))
        node = self._index(node, tuple(item for _, item in places))
        return self._index(node, tuple(slice(None) if symbol in kept else None for symbol in self.axes))

    def _place(self, index: sympy.Expr, size: sympy.Expr) -> tuple[sympy.Symbol | None, int | slice | None]:
        """The axis that an index runs along, if any, and the item that selects it; None if no slice does."""
        if index.is_Integer:
            return None, int(index)
        for symbol, length in self.axes.items():
            start = index - symbol
            if start == 0 and length == size:
                return symbol, slice(None)
            if start.is_Integer and length.is_Integer:
                return symbol, slice(int(start), int(start + length))
        return None, None

    def _index(self, node: Node, items: tuple[Any, ...]) -> Node:
        if all(item == slice(None) for item in items):
            return node
        return self.graph.call_function(operator.getitem, (node, items))

    def _dtype(self, leaf: AppliedUndef) -> torch.dtype | None:
        tensor = fake_tensor(self.leaves[leaf.func.__name__])
        return None if tensor is None else tensor.dtype

    def _flag(self, leaf: AppliedUndef) -> Node:
        """Where a leaf that holds no whole numbers is not zero."""
        node = self.leaf(leaf)
        return node if self._dtype(leaf) == torch.bool else self.graph.call_method("to", (node, torch.bool))

    def _varies(self, expression: sympy.Expr) -> bool:
        return bool(expression.atoms(AppliedUndef) or expression.free_symbols & self.axes.keys())

    def _value(self, expression: sympy.Expr) -> Value:
        """Whole numbers as a number, a node that holds one, or a tensor."""
        if expression in self.axes:
            return self._positions(expression)
        if isinstance(expression, AppliedUndef):
            return self.graph.call_method("to", (self.leaf(expression), torch.int64))
        if not self._varies(expression):
            return emit_size(self.graph, expression, self.site)
        if isinstance(expression, (sympy.Add, sympy.Mul)):
            form = operator.add if isinstance(expression, sympy.Add) else operator.mul
            value: Value = _folded(self.graph, form, map(self._value, expression.args))
            return value
        if isinstance(expression, sympy.Abs):
            return self.graph.call_function(torch.abs, (self._value(expression.args[0]),))
        if isinstance(expression, sympy.Mod):
            return self.graph.call_function(torch.remainder, tuple(map(self._value, expression.args)))
        dividend, divisor = expression.args[0].as_numer_denom()
        return self.graph.call_function(operator.floordiv, (self._value(dividend), self._value(divisor)))

    def _positions(self, symbol: sympy.Symbol) -> Node:
        size = emit_size(self.graph, self.axes[symbol], self.site)
        positions = self.graph.call_function(torch.arange, (size,), {"device": self.device})
        return self._index(positions, tuple(slice(None) if symbol == other else None for other in self.axes))
