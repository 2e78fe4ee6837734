"""Reads tensors of a graph as symbolic functions of their own indices.

A tensor of integers becomes a sympy expression over `axis(1)`, its last index, `axis(2)`, the one before, and
so on; a tensor of booleans, or of zeros and ones, becomes a sympy predicate; one of a single floating point number
becomes that number, and one of two numbers a `Choice`. Counting from the right makes
broadcasting free, as an axis of size 1 never occurs in an expression. What cannot be read becomes a *leaf*:
an unknown function of its indices. So every reading is exact, and only says less the more leaves it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.node_values import fake_tensor, symbolic, symbolic_shape
from ..graph.operations import operation_name, out_of_place
from ..graph.torch_internals import is_batched
from .clauses import at_least_zero, is_zero

INTEGERS = (torch.int32, torch.int64)
Shape = tuple[sympy.Expr, ...]
Handler = Callable[..., sympy.Basic]


class Index(sympy.Symbol):
    """The index along a dimension."""


def axis(place: int) -> Index:
    """The index along the axis that is `place`-th from the right, starting at 1."""
    return Index(f"axis{place}", integer=True, nonnegative=True)


KEY, QUERY, HEAD, BATCH = (axis(place) for place in range(1, 5))
"""The indices along the axes of scores."""


def level(number: int) -> Index:
    """The index along the dimension that vmap hides at a level of its nesting."""
    return Index(f"level{number}", integer=True, nonnegative=True)


class Unreadable(Exception):
    """A node's value cannot be read."""


class Choice(sympy.Basic):
    """One number where a predicate holds and another elsewhere."""

    @property
    def predicate(self) -> Boolean:
        """Where the first of `values` stands."""
        return self.args[0]

    @property
    def values(self) -> tuple[sympy.Expr, sympy.Expr]:
        """The number where the predicate holds, and the one elsewhere."""
        return self.args[1], self.args[2]


def as_choice(expression: sympy.Basic) -> Choice | None:
    """A reading as a choice of two numbers; None if it is none."""
    if isinstance(expression, Choice):
        return expression
    if expression in (sympy.true, sympy.false):
        expression = sympy.Integer(1 if expression == sympy.true else 0)
    if is_predicate(expression):
        return Choice(expression, sympy.Integer(1), sympy.Integer(0))
    return Choice(sympy.true, expression, expression) if expression.is_number else None


@dataclass(frozen=True)
class Reading:
    """What a tensor holds: an expression or predicate over its axes, and the shape that they run over."""

    expression: sympy.Basic
    shape: Shape


class Reader:
    """Reads the nodes of one graph, each once.

    Args:
        handlers: How operations are read, by name.
        is_changed: Whether a node's tensor is written to somewhere; what is computed from it is then not read.

    Attributes:
        readings: What was read, by node.
        leaves: The nodes that could not be read, by the name of the unknown function that stands for each.
        understood: The nodes that were read as operations; they have no side effects but in-place ones.
    """

    def __init__(self, handlers: Mapping[str, Handler], is_changed: Callable[[Node], bool] | None = None) -> None:
        self.handlers, self.is_changed = handlers, is_changed
        self.readings: dict[Node, Reading] = {}
        self.leaves: dict[str, Node] = {}
        self.understood: set[Node] = set()

    def without(self, is_changed: Callable[[Node], bool]) -> Reader:
        """A reader with the same leaves, for which what is computed from changed tensors is a leaf too."""
        careful = Reader(self.handlers, is_changed)
        careful.leaves, careful.understood = self.leaves, self.understood
        return careful

    def read(self, node: Node) -> Reading:
        """The reading of a node that holds a tensor.

        Raises:
            Unreadable: The node's shape is not known, or it is a leaf that varies over more than its own indices.
        """
        if node not in self.readings:
            tensor = fake_tensor(node)
            if tensor is None:
                raise Unreadable(f"the shape of {node.name} is not known")
            shape = symbolic_shape(tensor)
            try:
                expression = self._operation(node)
                self.understood.add(node)
            except Unreadable:
                expression = self.leaf(node, tensor)
            self.readings[node] = Reading(_without_unit_axes(expression, shape), shape)
        return self.readings[node]

    def _operation(self, node: Node) -> sympy.Basic:
        name = operation_name(node)
        handler = None if name is None else self.handlers.get(out_of_place(name))
        if handler is None or "out" in node.kwargs:
            raise Unreadable
        if self.is_changed is not None and any(map(self.is_changed, [node, *node.all_input_nodes])):
            raise Unreadable
        try:
            inspect.signature(handler).bind(self, node, *node.args, **node.kwargs)
        except TypeError:
            raise Unreadable from None
        return handler(self, node, *node.args, **node.kwargs)

    def leaf(self, node: Node, tensor: torch.Tensor) -> sympy.Basic:
        """A node that holds `tensor` as an unknown function of its indices.

        Raises:
            Unreadable: It varies over other indices too, which vmap hides.
        """
        if is_batched(tensor):
            raise Unreadable(f"{node.name} is computed under vmap")
        name = f"tensor_{node.name}"
        self.leaves[name] = node
        places = (axis(place) for place in range(tensor.dim(), 0, -1))
        value = sympy.Function(name, integer=tensor.dtype in INTEGERS or None)(*places)
        expression = sympy.Ne(value, 0) if tensor.dtype == torch.bool else value
        return _without_unit_axes(expression, symbolic_shape(tensor))

    def sources(self, node: Node) -> set[Node]:
        """The nodes that were read for a node, leaves and itself included."""
        found: set[Node] = set()
        pending = [node]
        while pending:
            source = pending.pop()
            if source not in found:
                found.add(source)
                pending.extend(source.all_input_nodes if source in self.understood else ())
        return found

    def operand(self, value: Any, shape: Shape) -> sympy.Basic:
        """An operand of an operation whose result has `shape`: a tensor that broadcasts to it or a number."""
        if fake_tensor(value) is not None:
            reading = self.read(value)
            if not _broadcasts(reading.shape, shape):
                raise Unreadable
            return reading.expression
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        return as_sympy(value) if isinstance(value, float) else self.integer(value)

    def number(self, node: Node) -> float | None:
        """The number that all elements of a tensor are; None if there is none or it is not known."""
        tensor = fake_tensor(node)
        if tensor is None or tensor.dtype == torch.bool:
            return None
        try:
            choice = as_choice(self.read(node).expression)
        except Unreadable:
            return None
        return float(choice.values[0]) if choice is not None and choice.predicate == sympy.true else None

    def choice(self, value: Any, shape: Shape) -> Choice:
        """An operand as a choice of two numbers."""
        choice = as_choice(self.operand(value, shape))
        if choice is None:
            raise Unreadable
        return choice

    def integer(self, value: Any) -> sympy.Expr:
        """A whole number, a symbolic size or a node that holds one."""
        expression = symbolic(value)
        if expression is None:
            raise Unreadable
        return expression

    def predicate(self, value: Any, shape: Shape) -> Boolean:
        """An operand as a predicate: where it is not zero."""
        return nonzero(self.operand(value, shape))

    def integers(self, value: Any, shape: Shape) -> sympy.Expr:
        """An operand as whole numbers, of axes and leaves."""
        tensor = fake_tensor(value)
        if isinstance(value, float) or (tensor is not None and tensor.dtype not in INTEGERS):
            raise Unreadable
        expression = self.operand(value, shape)
        if not isinstance(expression, sympy.Expr) or not expression.is_integer:
            raise Unreadable
        return expression


def as_sympy(value: float) -> sympy.Expr:
    """A number, as an integer where it is one."""
    if isinstance(value, int):
        return sympy.Integer(value)
    return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)


def _without_unit_axes(expression: sympy.Basic, shape: Shape) -> sympy.Basic:
    unit = {axis(len(shape) - place): sympy.Integer(0) for place, size in enumerate(shape) if size == 1}
    return expression.xreplace(unit) if unit else expression


def _broadcasts(shape: Shape, result: Shape) -> bool:
    if len(shape) > len(result):
        return False
    return all(size in (1, wide) for size, wide in zip(shape[::-1], result[::-1], strict=False))


def is_predicate(expression: sympy.Basic) -> bool:
    """Whether an expression is one of booleans; sympy counts its symbols as such too."""
    return isinstance(expression, Boolean) and not isinstance(expression, sympy.Expr)


def nonzero(expression: sympy.Basic) -> Boolean:
    """Where an expression is not zero."""
    if is_predicate(expression):
        return expression
    choice = as_choice(expression)
    if choice is not None:
        return where(choice, lambda value: value != 0)
    return sympy.Not(is_zero(expression))


def cases(choice: Choice) -> list[tuple[Boolean, sympy.Expr]]:
    """Where each of the two numbers of a choice stands."""
    return [(choice.predicate, choice.values[0]), (sympy.Not(choice.predicate), choice.values[1])]


def merge(found: Iterable[tuple[Boolean, float]]) -> sympy.Basic:
    """The reading of numbers that stand each where a predicate holds; the predicates cover all places once.

    Raises:
        Unreadable: There are more than two numbers.
    """
    places: dict[sympy.Expr, Boolean] = {}
    for predicate, value in found:
        if predicate != sympy.false:
            places[as_sympy(value)] = sympy.Or(places.get(as_sympy(value), sympy.false), predicate)
    if len(places) == 1:
        return next(iter(places))
    if len(places) > 2:
        raise Unreadable
    if set(places) == {0, 1}:
        return places[sympy.Integer(1)]
    first, second = sorted(places, key=lambda value: places[value].count_ops())
    return Choice(places[first], first, second)


def where(choice: Choice, test: Callable[[sympy.Expr], bool]) -> Boolean:
    """Where a choice has values that pass a test."""
    first, second = (bool(test(value)) for value in choice.values)
    if first == second:
        return sympy.true if first else sympy.false
    return choice.predicate if first else sympy.Not(choice.predicate)


def bounds(expression: sympy.Expr, shape: Shape) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The least and the greatest value of an expression over a shape; None if it is not affine in its axes."""
    ends = {axis(len(shape) - place): (sympy.Integer(0), size - 1) for place, size in enumerate(shape)}
    if any(term.free_symbols & ends.keys() for term in expression.atoms(sympy.Function, sympy.Mod)):
        return None
    low, high = {}, {}
    for symbol, (first, last) in ends.items():
        slope = expression.coeff(symbol)
        if slope.is_nonnegative is None:
            return None
        low[symbol], high[symbol] = (first, last) if slope.is_nonnegative else (last, first)
    return expression.xreplace(low), expression.xreplace(high)


def at_least_zero_within(expression: sympy.Expr, shape: Shape) -> Boolean:
    """Where an expression over a shape is at least zero."""
    ends = bounds(expression, shape)
    if ends is not None and ends[0].is_nonnegative:
        return sympy.true
    if ends is not None and ends[1].is_negative:
        return sympy.false
    return at_least_zero(expression)
