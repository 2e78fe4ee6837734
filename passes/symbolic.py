"""Reads tensors of a graph as symbolic functions of their own indices.

A tensor of integers becomes a sympy expression over `axis(1)`, its last index, `axis(2)`, the one before, and
so on; a tensor of booleans, or of zeros and ones, becomes a sympy predicate; one of a single floating point number
becomes that number, and one of two numbers a `Choice`. Counting from the right makes
broadcasting free, as an axis of size 1 never occurs in an expression. What cannot be read becomes a *leaf*:
an unknown function of its indices. So every reading is exact, and only says less the more leaves it has.
"""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from .operations import operation_name
from .values import fake_tensor, symbolic, symbolic_shape

_INTEGERS = (torch.int32, torch.int64)
_ZERO, _ONE = sympy.Integer(0), sympy.Integer(1)
Shape = tuple[sympy.Expr, ...]


def axis(place: int) -> sympy.Symbol:
    """The index along the axis that is `place`-th from the right, starting at 1."""
    return sympy.Symbol(f"axis{place}", integer=True, nonnegative=True)


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
        expression = _ONE if expression == sympy.true else _ZERO
    if _is_predicate(expression):
        return Choice(expression, _ONE, _ZERO)
    return Choice(sympy.true, expression, expression) if expression.is_number else None


@dataclass(frozen=True)
class Reading:
    """What a tensor holds: an expression or predicate over its axes, and the shape that they run over."""

    expression: sympy.Basic
    shape: Shape


class Reader:
    """Reads the nodes of one graph, each once.

    Attributes:
        readings: What was read, by node.
        leaves: The nodes that could not be read, by the name of the unknown function that stands for each.
        understood: The nodes that were read as operations; they have no side effects.
    """

    def __init__(self) -> None:
        self.readings: dict[Node, Reading] = {}
        self.leaves: dict[str, Node] = {}
        self.understood: set[Node] = set()

    def read(self, node: Node) -> Reading:
        """The reading of a node that holds a tensor.

        Raises:
            Unreadable: The node's shape is not known.
        """
        if node not in self.readings:
            tensor = fake_tensor(node)
            if tensor is None:
                raise Unreadable(f"the shape of {node.name} is not known")
            shape = symbolic_shape(tensor)
            self.readings[node] = Reading(_without_unit_axes(self._expression(node, tensor, shape), shape), shape)
        return self.readings[node]

    def _expression(self, node: Node, tensor: torch.Tensor, shape: Shape) -> sympy.Basic:
        try:
            expression = self._operation(node)
        except Unreadable:
            return self._leaf(node, tensor, shape)
        self.understood.add(node)
        return expression

    def _operation(self, node: Node) -> sympy.Basic:
        handler = _HANDLERS.get(operation_name(node))
        if handler is None or "out" in node.kwargs:
            raise Unreadable
        try:
            inspect.signature(handler).bind(self, node, *node.args, **node.kwargs)
        except TypeError:
            raise Unreadable from None
        expression = handler(self, node, *node.args, **node.kwargs)
        if expression.has(sympy.Or):
            raise Unreadable
        return expression

    def _leaf(self, node: Node, tensor: torch.Tensor, shape: Shape) -> sympy.Basic:
        name = f"tensor_{node.name}"
        self.leaves[name] = node
        value = sympy.Function(name)(*(axis(place) for place in range(len(shape), 0, -1)))
        return sympy.Ne(value, 0) if tensor.dtype == torch.bool else value

    def operand(self, value: Any, shape: Shape) -> sympy.Basic:
        """An operand of an operation whose result has `shape`: a tensor that broadcasts to it or a number."""
        if fake_tensor(value) is not None:
            reading = self.read(value)
            if not _broadcasts(reading.shape, shape):
                raise Unreadable
            return reading.expression
        if isinstance(value, bool):
            return sympy.true if value else sympy.false
        return _sympy_number(value) if isinstance(value, float) else self.integer(value)

    def number(self, node: Node) -> float | None:
        """The number that all elements of a tensor are; None if there is none or it is not known."""
        tensor = fake_tensor(node)
        if tensor is None or tensor.dtype == torch.bool:
            return None
        choice = as_choice(self.read(node).expression)
        return float(choice.values[0]) if choice is not None and choice.predicate is sympy.true else None

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
        return _nonzero(self.operand(value, shape))

    def affine(self, value: Any, shape: Shape) -> sympy.Expr:
        """An operand as whole numbers that depend on the axes alone."""
        expression = self.operand(value, shape)
        if not isinstance(expression, sympy.Expr) or expression.atoms(AppliedUndef):
            raise Unreadable
        if not all(number.is_Integer for number in expression.atoms(sympy.Number)):
            raise Unreadable
        return expression


def _sympy_number(value: float) -> sympy.Expr:
    return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)


def _without_unit_axes(expression: sympy.Basic, shape: Shape) -> sympy.Basic:
    unit = {axis(len(shape) - place): sympy.Integer(0) for place, size in enumerate(shape) if size == 1}
    return expression.xreplace(unit)


def _broadcasts(shape: Shape, result: Shape) -> bool:
    if len(shape) > len(result):
        return False
    return all(size in (1, wide) for size, wide in zip(shape[::-1], result[::-1], strict=False))


def _is_predicate(expression: sympy.Basic) -> bool:
    # sympy counts its symbols as booleans too.
    return isinstance(expression, Boolean) and not isinstance(expression, sympy.Expr)


def _nonzero(expression: sympy.Basic) -> Boolean:
    if _is_predicate(expression):
        return expression
    if isinstance(expression, Choice):
        return _holds(expression, lambda value: value != 0)
    if expression.is_Integer or isinstance(expression, AppliedUndef):
        return sympy.Ne(expression, 0)
    raise Unreadable


def _choice(predicate: Boolean, first: sympy.Expr, second: sympy.Expr) -> sympy.Basic:
    """The reading of one number where a predicate holds and another elsewhere."""
    if predicate == sympy.true or first == second:
        return first
    if predicate == sympy.false:
        return second
    return predicate if (first, second) == (1, 0) else Choice(predicate, first, second)


def _chosen(predicate: Boolean, first: Choice, second: Choice) -> sympy.Basic:
    """The reading of one choice where a predicate holds and another elsewhere, if two numbers are left."""
    if second.predicate != sympy.true:
        if first.predicate != sympy.true:
            raise Unreadable
        return _chosen(sympy.Not(predicate), second, first)
    value, (inside, outside) = second.values[0], first.values
    if first.predicate == sympy.true:
        return _choice(predicate, inside, value)
    if value == outside:
        return _choice(sympy.And(predicate, first.predicate), inside, outside)
    if value == inside:
        return _choice(sympy.And(predicate, sympy.Not(first.predicate)), outside, inside)
    raise Unreadable


def _combined(form: Callable[[Any, Any], Any], left: Choice, right: Choice) -> sympy.Basic:
    """The reading of an operation on two choices, if two numbers are left."""
    if right.predicate == sympy.true:
        predicate = left.predicate
    elif left.predicate in (sympy.true, right.predicate):
        predicate = right.predicate
    elif form is operator.mul and left.values[1] == right.values[1] == 0:
        predicate = sympy.And(left.predicate, right.predicate)
    else:
        raise Unreadable
    pairs = (map(float, pair) for pair in zip(left.values, right.values, strict=True))
    try:
        return _choice(predicate, *(_sympy_number(form(*pair)) for pair in pairs))
    except ZeroDivisionError:
        raise Unreadable from None


def _holds(choice: Choice, test: Callable[[sympy.Expr], bool]) -> Boolean:
    """Where a choice has values that pass a test."""
    first, second = (bool(test(value)) for value in choice.values)
    if first == second:
        return sympy.true if first else sympy.false
    return choice.predicate if first else sympy.Not(choice.predicate)


def bounds(expression: sympy.Expr, shape: Shape) -> tuple[sympy.Expr, sympy.Expr]:
    """The least and the greatest value of an affine expression over a shape."""
    low, high = {}, {}
    for place, size in enumerate(shape):
        symbol = axis(len(shape) - place)
        ends = (sympy.Integer(0), size - 1)
        rising = expression.coeff(symbol) >= 0
        low[symbol], high[symbol] = ends if rising else ends[::-1]
    return expression.xreplace(low), expression.xreplace(high)


def _at_least_zero(expression: sympy.Expr, shape: Shape) -> Boolean:
    low, high = bounds(expression, shape)
    if low.is_nonnegative:
        return sympy.true
    if high.is_negative:
        return sympy.false
    return sympy.Ge(expression, 0)


def _shape(node: Node) -> Shape:
    tensor = fake_tensor(node)
    if tensor is None:
        raise Unreadable
    return symbolic_shape(tensor)


def _dtype(node: Any) -> torch.dtype | None:
    tensor = fake_tensor(node)
    return None if tensor is None else tensor.dtype


def _is_floating(node: Any) -> bool:
    dtype = _dtype(node)
    return dtype is not None and dtype.is_floating_point


def _need_integers(node: Node) -> None:
    if _dtype(node) not in _INTEGERS:
        raise Unreadable


def _arange(
    reader: Reader, node: Node, *limits: Any, start: Any = 0, end: Any = None, step: Any = 1, **_: Any
) -> sympy.Basic:
    _need_integers(node)
    if len(limits) > 1:
        start = limits[0]
    if len(limits) > 2:
        step = limits[2]
    if not isinstance(step, int):
        raise Unreadable
    return reader.integer(start) + step * axis(1)


def _ones(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    return sympy.true


def _zeros(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    return sympy.false


def _full(reader: Reader, node: Node, *args: Any, fill_value: Any = None, **_: Any) -> sympy.Basic:
    value = args[-1] if fill_value is None else fill_value
    if not isinstance(value, (bool, int, float)):
        raise Unreadable
    if isinstance(value, bool) or _dtype(node) == torch.bool:
        return sympy.true if value else sympy.false
    if not _is_floating(node):
        _need_integers(node)
    return _sympy_number(float(value)) if _is_floating(node) else sympy.Integer(value)


def _tensor(reader: Reader, node: Node, data: Any, **_: Any) -> sympy.Basic:
    return _full(reader, node, data)


def _triangle(reader: Reader, node: Node, input: Any, diagonal: Any, sign: int) -> sympy.Basic:
    shape = _shape(node)
    below = axis(2) + reader.integer(diagonal) - axis(1)
    return _chosen(_at_least_zero(sign * below, shape), reader.choice(input, shape), reader.choice(0, shape))


def _where(reader: Reader, node: Node, condition: Any, input: Any, other: Any) -> sympy.Basic:
    if node.op == "call_method":
        condition, input = input, condition
    return _select(reader, node, _flag(reader.operand(condition, _shape(node))), input, other)


def _masked_fill(reader: Reader, node: Node, input: Any, mask: Any, value: Any) -> sympy.Basic:
    return _select(reader, node, sympy.Not(_flag(reader.operand(mask, _shape(node)))), input, value)


def _select(reader: Reader, node: Node, predicate: Boolean, first: Any, second: Any) -> sympy.Basic:
    shape = _shape(node)
    chosen = _chosen(predicate, reader.choice(first, shape), reader.choice(second, shape))
    return _nonzero(chosen) if _dtype(node) == torch.bool else chosen


def _flag(expression: sympy.Basic) -> Boolean:
    if not _is_predicate(expression):
        raise Unreadable
    return expression


def _tril(reader: Reader, node: Node, input: Any, diagonal: Any = 0) -> sympy.Basic:
    return _triangle(reader, node, input, diagonal, 1)


def _triu(reader: Reader, node: Node, input: Any, diagonal: Any = 0) -> sympy.Basic:
    return _triangle(reader, node, input, diagonal, -1)


def _comparison(form: Callable[[Any, Any], Any]) -> Callable[..., sympy.Basic]:
    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(node)
        difference = form(reader.affine(input, shape), reader.affine(other, shape))
        return _at_least_zero(sympy.expand(difference), shape)

    return handler


def _equal(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    expression = reader.operand(input, _shape(node))
    if isinstance(expression, Choice) and isinstance(other, (int, float)):
        return _holds(expression, lambda value: float(value) == other)
    if other not in (0, 1):
        raise Unreadable
    if other == 1:
        return _flag(expression)
    return sympy.Not(_nonzero(expression))


def _not_equal(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return sympy.Not(_equal(reader, node, input, other))


def _and(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    return sympy.And(_flag(reader.operand(input, shape)), _flag(reader.operand(other, shape)))


def _logical_and(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    return sympy.And(reader.predicate(input, shape), reader.predicate(other, shape))


def _or(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    return sympy.Or(_flag(reader.operand(input, shape)), _flag(reader.operand(other, shape)))


def _not(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    if _dtype(input) != torch.bool:
        raise Unreadable
    return sympy.Not(reader.predicate(input, _shape(node)))


def _arithmetic(form: Callable[[Any, Any], Any]) -> Callable[..., sympy.Basic]:
    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(node)
        if _is_floating(node):
            return _combined(form, reader.choice(input, shape), reader.choice(other, shape))
        _need_integers(node)
        return sympy.expand(form(reader.affine(input, shape), reader.affine(other, shape)))

    return handler


def _multiply(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    if _dtype(node) == torch.bool:
        return _and(reader, node, input, other)
    if _is_floating(node):
        return _combined(operator.mul, reader.choice(input, shape), reader.choice(other, shape))
    _need_integers(node)
    factors = reader.affine(input, shape), reader.affine(other, shape)
    if not any(factor.is_Integer for factor in factors):
        raise Unreadable
    return sympy.expand(factors[0] * factors[1])


def _negative(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    if _is_floating(node):
        return _combined(operator.mul, reader.choice(input, _shape(node)), reader.choice(-1, _shape(node)))
    _need_integers(node)
    return -reader.affine(input, _shape(node))


def _divide(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    return _combined(operator.truediv, reader.choice(input, shape), reader.choice(other, shape))


def _sqrt(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    value = reader.number(input)
    if value is None or value < 0:
        raise Unreadable
    return _sympy_number(math.sqrt(value))


def _cast(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    expression, old, new = reader.operand(input, _shape(node)), _dtype(input), _dtype(node)
    if new == torch.bool:
        return _nonzero(expression)
    if old == new or _is_predicate(expression):
        return expression
    if old in _INTEGERS and new in _INTEGERS:
        return reader.affine(input, _shape(node))
    if _is_floating(node) and (_is_floating(input) or expression.is_Integer):
        return reader.operand(input, _shape(node))
    raise Unreadable


def _same(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    return reader.operand(input, _shape(node))


def _reshape(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    if _dtype(input) != _dtype(node):
        raise Unreadable
    old, new = reader.read(input), _shape(node)
    before, after = ([n for n, size in enumerate(shape) if size != 1] for shape in (old.shape, new))
    if [old.shape[n] for n in before] != [new[n] for n in after]:
        raise Unreadable
    moved = {axis(len(old.shape) - b): axis(len(new) - a) for b, a in zip(before, after, strict=True)}
    return old.expression.xreplace(moved)


def _permute(reader: Reader, node: Node, input: Any, *dims: Any) -> sympy.Basic:
    order = dims[0] if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else dims
    old = reader.read(input)
    rank = len(old.shape)
    if len(order) != rank or not all(isinstance(dim, int) for dim in order):
        raise Unreadable
    return old.expression.xreplace({axis(rank - dim % rank): axis(rank - n) for n, dim in enumerate(order)})


def _transpose(reader: Reader, node: Node, input: Any, dim0: Any, dim1: Any) -> sympy.Basic:
    rank = len(_shape(node))
    if not rank or not isinstance(dim0, int) or not isinstance(dim1, int):
        raise Unreadable
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(reader, node, input, *order)


def _getitem(reader: Reader, node: Node, source: Any, index: Any) -> sympy.Basic:
    if fake_tensor(source) is None:
        raise Unreadable
    old = reader.read(source)
    items = index if isinstance(index, tuple) else (index,)
    if any(fake_tensor(item) is not None for item in items):
        return old.expression.xreplace(_gathered(reader, items, old.shape, _shape(node)))
    return old.expression.xreplace(_sliced(reader, _without_ellipsis(items, len(old.shape)), old.shape, _shape(node)))


def _gathered(reader: Reader, items: tuple[Any, ...], old: Shape, new: Shape) -> dict[sympy.Basic, sympy.Basic]:
    if len(items) != len(old) or any(_dtype(item) not in _INTEGERS for item in items):
        raise Unreadable
    places: dict[sympy.Basic, sympy.Basic] = {}
    for n, item in enumerate(items):
        place = reader.affine(item, new)
        if not bounds(place, new)[0].is_nonnegative:
            raise Unreadable
        places[axis(len(old) - n)] = place
    return places


def _without_ellipsis(items: tuple[Any, ...], rank: int) -> list[Any]:
    taken = sum(item is not None and item is not Ellipsis for item in items)
    if taken > rank:
        raise Unreadable
    missing = [slice(None)] * (rank - taken)
    if Ellipsis not in items:
        return [*items, *missing]
    at = items.index(Ellipsis)
    return [*items[:at], *missing, *items[at + 1 :]]


def _sliced(reader: Reader, items: list[Any], old: Shape, new: Shape) -> dict[sympy.Basic, sympy.Basic]:
    places: dict[sympy.Basic, sympy.Basic] = {}
    source = target = 0
    for item in items:
        if item is None:
            target += 1
            continue
        symbol, size = axis(len(old) - source), old[source]
        source += 1
        if isinstance(item, slice):
            step = 1 if item.step is None else item.step
            if not isinstance(step, int):
                raise Unreadable
            places[symbol] = _position(reader, item.start or 0, size) + step * axis(len(new) - target)
            target += 1
        else:
            places[symbol] = _position(reader, item, size)
    return places


def _position(reader: Reader, index: Any, size: sympy.Expr) -> sympy.Expr:
    if isinstance(index, bool):
        raise Unreadable
    place = reader.integer(index)
    if place.is_negative:
        place = size + place
    if not place.is_nonnegative:
        raise Unreadable
    return place


_HANDLERS: dict[str | None, Callable[..., sympy.Basic]] = {
    "arange": _arange,
    "tril": _tril,
    "triu": _triu,
    "le": _comparison(lambda a, b: b - a),
    "lt": _comparison(lambda a, b: b - a - 1),
    "ge": _comparison(lambda a, b: a - b),
    "gt": _comparison(lambda a, b: a - b - 1),
    "eq": _equal,
    "ne": _not_equal,
    "add": _arithmetic(operator.add),
    "sub": _arithmetic(operator.sub),
    "mul": _multiply,
    "neg": _negative,
    "transpose": _transpose,
    "permute": _permute,
    "getitem": _getitem,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _ones),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _zeros),
    **dict.fromkeys(("tensor", "scalar_tensor"), _tensor),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("div", "truediv"), _divide),
    "sqrt": _sqrt,
    **dict.fromkeys(("full", "new_full", "full_like"), _full),
    **dict.fromkeys(("and_", "bitwise_and", "__and__"), _and),
    **dict.fromkeys(("or_", "bitwise_or", "__or__", "logical_or"), _or),
    "logical_and": _logical_and,
    **dict.fromkeys(("invert", "inv", "bitwise_not", "logical_not"), _not),
    **dict.fromkeys(("to", "bool", "long", "int", "type", "type_as", "float", "half", "bfloat16"), _cast),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "clone", "contiguous", "detach"), _same),
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze"), _reshape),
}
