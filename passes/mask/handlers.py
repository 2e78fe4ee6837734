"""How each operation that masks are built with is read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.node_values import fake_tensor, is_floating, is_nonnegative, symbolic_shape
from ..graph.operations import Permuted
from ..graph.read_operations import read_operation
from .clauses import is_zero
from .constants import Number, as_number, computed, held
from .expressions import (
    INTEGERS,
    Choice,
    Index,
    Shape,
    Unreadable,
    as_choice,
    at_least_zero_within,
    axis,
    bounds,
    cases,
    is_predicate,
    level,
    merge,
    nonzero,
    where,
)
from .reader import Handler, Reader

_LONGEST = 2**24
"""The longest attention for which reading is right: positions may be added, multiplied and scaled in 64 bits."""
_ZEROS = Choice(sympy.true, sympy.Integer(0), sympy.Integer(0))


def _shape(node: Any) -> Shape:
    tensor = fake_tensor(node)
    if tensor is None:
        raise Unreadable
    return symbolic_shape(tensor)


def _dtype(node: Any) -> torch.dtype | None:
    tensor = fake_tensor(node)
    return None if tensor is None else tensor.dtype


def _need(holds: bool) -> None:
    if not holds:
        raise Unreadable


def _whole(node: Node, expression: sympy.Expr) -> sympy.Expr:
    """The result of arithmetic on integers.

    Where unknown ones of 64 bits overflow, sums and multiples of them are as equal as without; nothing else is read
    from these.
    """
    expression, dtype = sympy.expand(expression), _dtype(node)
    _need(dtype in INTEGERS and _fits(expression, dtype))
    return expression


def _fits(expression: sympy.Expr, dtype: torch.dtype | None) -> bool:
    """Whether whole numbers of a dtype hold an expression of indices and sizes up to `_LONGEST`.

    Of unknown numbers, those of 32 bits may be more, and those of 64 bits are left to what reads them.
    """
    if dtype == torch.int32 and expression.atoms(AppliedUndef):
        return False
    most = 0
    for term, factor in expression.as_coefficients_dict().items():
        degree = 0 if term.is_number else sum(term.as_powers_dict().values())
        if not sympy.sympify(degree).is_Integer:
            return False
        most += abs(factor) * _LONGEST**degree
    return bool(most < (2**31 if dtype == torch.int32 else 2**62))


def _cannot_overflow(expression: sympy.Expr) -> bool:
    """Whether no sum or multiple of unknown numbers is in an expression."""
    return isinstance(expression, (AppliedUndef, sympy.floor, sympy.Mod)) or not expression.atoms(AppliedUndef)


def _exact(reader: Reader, value: Any, shape: Shape) -> sympy.Expr:
    """An operand as whole numbers that are those of an arithmetic without overflow."""
    expression = reader.integers(value, shape)
    _need(_cannot_overflow(expression))
    return expression


def _compared(
    reader: Reader, shape: Shape, input: Any, other: Any, read: Callable[[Reader, Any, Shape], sympy.Expr]
) -> tuple[sympy.Expr, sympy.Expr]:
    """Both operands of a comparison of whole numbers, which both fit the dtype that they are compared in."""
    tensors = [tensor for tensor in map(fake_tensor, (input, other)) if tensor is not None]
    wide = any(tensor.dtype == torch.int64 for tensor in [t for t in tensors if t.dim()] or tensors)
    sides = read(reader, input, shape), read(reader, other, shape)
    dtype = torch.int64 if wide else torch.int32
    _need(all(_dtype(value) == dtype or _fits(side, dtype) for value, side in zip((input, other), sides, strict=True)))
    return sides


def _merged(node: Any, found: Iterable[tuple[Boolean, Number]]) -> sympy.Basic:
    """The reading of a node from the numbers that stand where predicates hold, as its dtype holds them."""
    dtype = _dtype(node)
    if dtype is None:
        raise Unreadable
    return merge((predicate, held(value, dtype)) for predicate, value in found)


def _cases(choice: Choice) -> list[tuple[Boolean, Number]]:
    return [(predicate, as_number(value)) for predicate, value in cases(choice)]


def _combined(reader: Reader, node: Node, form: Callable[..., Any], input: Any, other: Any) -> sympy.Basic:
    """The reading of an operation on two operands, each of two numbers."""
    shape = _shape(node)
    return _merged(
        node,
        [
            (sympy.And(in_first, in_second), computed(form, (first, input), (second, other)))
            for in_first, first in cases(reader.choice(input, shape))
            for in_second, second in cases(reader.choice(other, shape))
        ],
    )


def _selected(node: Node, predicate: Boolean, first: Choice, second: Choice) -> sympy.Basic:
    """The reading of one choice where a predicate holds and another elsewhere."""
    inside = [(sympy.And(predicate, place), value) for place, value in _cases(first)]
    outside = [(sympy.And(sympy.Not(predicate), place), value) for place, value in _cases(second)]
    return _merged(node, inside + outside)


def _arange(
    reader: Reader, node: Node, *limits: Any, start: Any = 0, end: Any = None, step: Any = 1, **_: Any
) -> sympy.Basic:
    if len(limits) > 1:
        start = limits[0]
    if len(limits) > 2:
        step = limits[2]
    _need(isinstance(step, int))
    return _whole(node, reader.integer(start) + step * axis(1))


def _ones(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    return sympy.true


def _zeros(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    return sympy.false


def _full(reader: Reader, node: Node, *args: Any, fill_value: Any = None, **_: Any) -> sympy.Basic:
    value = args[-1] if fill_value is None else fill_value
    _need(isinstance(value, (bool, int, float)))
    return _merged(node, [(sympy.true, value)])


def _tensor(reader: Reader, node: Node, data: Any, **_: Any) -> sympy.Basic:
    return _full(reader, node, data)


def _triangle(reader: Reader, node: Node, input: Any, diagonal: Any, sign: int) -> sympy.Basic:
    shape = _shape(node)
    below = axis(2) + reader.integer(diagonal) - axis(1)
    return _selected(node, at_least_zero_within(sign * below, shape), reader.choice(input, shape), _ZEROS)


def _tril(reader: Reader, node: Node, input: Any, diagonal: Any = 0) -> sympy.Basic:
    return _triangle(reader, node, input, diagonal, 1)


def _triu(reader: Reader, node: Node, input: Any, diagonal: Any = 0) -> sympy.Basic:
    return _triangle(reader, node, input, diagonal, -1)


def _where(reader: Reader, node: Node, condition: Any, input: Any, other: Any) -> sympy.Basic:
    if node.op == "call_method":
        condition, input = input, condition
    return _filled(reader, node, _flag(reader.operand(condition, _shape(node))), input, other)


def _masked_fill(reader: Reader, node: Node, input: Any, mask: Any, value: Any) -> sympy.Basic:
    return _filled(reader, node, sympy.Not(_flag(reader.operand(mask, _shape(node)))), input, value)


def _filled(reader: Reader, node: Node, predicate: Boolean, first: Any, second: Any) -> sympy.Basic:
    shape = _shape(node)
    return _selected(node, predicate, reader.choice(first, shape), reader.choice(second, shape))


def _flag(expression: sympy.Basic) -> Boolean:
    if expression in (0, 1):
        return sympy.true if expression == 1 else sympy.false
    _need(is_predicate(expression))
    return expression


def _comparison(compare: Callable[..., Any], form: Callable[[Any, Any], Any]) -> Handler:
    """The handler of a comparison that holds where `form` of both operands is at least zero."""

    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(node)
        if is_floating(input) or is_floating(other) or isinstance(other, float):
            return _tested(compare, input, other, reader.choice(input, shape), reader.choice(other, shape))
        return _at_least_zero(sympy.expand(form(*_compared(reader, shape, input, other, _exact))), shape)

    return handler


def _tested(compare: Callable[..., Any], input: Any, other: Any, left: Choice, right: Choice) -> Boolean:
    """Where two numbers pass a comparison with one."""
    _need(right.predicate == sympy.true)
    return where(left, lambda value: bool(computed(compare, (value, input), (right.values[0], other))))


def _at_least_zero(difference: sympy.Expr, shape: Shape) -> Boolean:
    distance = next((term for term in difference.atoms(sympy.Abs) if term.atoms(Index)), None)
    if distance is None:
        return at_least_zero_within(difference, shape)
    both = (_at_least_zero(difference.xreplace({distance: sign * distance.args[0]}), shape) for sign in (1, -1))
    return (sympy.Or if difference.coeff(distance) > 0 else sympy.And)(*both)


def _equal(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    left, right = reader.operand(input, shape), reader.operand(other, shape)
    if is_predicate(left) and is_predicate(right):
        return sympy.Or(sympy.And(left, right), sympy.And(sympy.Not(left), sympy.Not(right)))
    choices = as_choice(left), as_choice(right)
    if choices[0] is not None and choices[1] is not None:
        return _tested(torch.eq, input, other, choices[0], choices[1])
    return is_zero(operator.sub(*_compared(reader, shape, input, other, Reader.integers)))


def _not_equal(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return sympy.Not(_equal(reader, node, input, other))


def _and(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    return sympy.And(_flag(reader.operand(input, shape)), _flag(reader.operand(other, shape)))


def _or(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    return sympy.Or(_flag(reader.operand(input, shape)), _flag(reader.operand(other, shape)))


def _logical(form: Callable[..., Boolean]) -> Handler:
    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(node)
        return form(reader.predicate(input, shape), reader.predicate(other, shape))

    return handler


def _not(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    _need(_dtype(input) == torch.bool)
    return sympy.Not(reader.predicate(input, _shape(node)))


def _logical_not(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    return sympy.Not(reader.predicate(input, _shape(node)))


def _arithmetic(form: Callable[[Any, Any], Any]) -> Handler:
    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = _shape(node)
        _need(_dtype(node) != torch.bool)
        if is_floating(node) or torch.bool in (_dtype(input), _dtype(other)):
            return _combined(reader, node, form, input, other)
        return _whole(node, form(reader.integers(input, shape), reader.integers(other, shape)))

    return handler


def _multiply(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = _shape(node)
    if _dtype(node) == torch.bool:
        return _and(reader, node, input, other)
    if is_floating(node):
        return _combined(reader, node, operator.mul, input, other)
    factors = reader.integers(input, shape), reader.integers(other, shape)
    _need(any(factor.is_Integer for factor in factors))
    return _whole(node, factors[0] * factors[1])


def _negative(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    return _multiply(reader, node, input, -1)


def _absolute(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    expression = reader.integers(input, _shape(node))
    _need(not expression.atoms(AppliedUndef))
    return _whole(node, sympy.Abs(expression))


def _divide(reader: Reader, node: Node, input: Any, other: Any, *, rounding_mode: Any = None) -> sympy.Basic:
    if rounding_mode == "floor":
        return _floor_divide(reader, node, input, other)
    _need(rounding_mode is None and 0 not in reader.choice(other, _shape(node)).values)
    return _combined(reader, node, operator.truediv, input, other)


def _floor_divide(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return _whole(node, sympy.floor(_exact(reader, input, _shape(node)) / _divisor(other)))


def _remainder(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return _whole(node, sympy.Mod(_exact(reader, input, _shape(node)), _divisor(other)))


def _divisor(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise Unreadable
    return value


def _sqrt(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    choice = reader.choice(input, _shape(node))
    return _merged(node, [(place, computed(torch.sqrt, (value, input))) for place, value in cases(choice)])


def _cumulative_sum(reader: Reader, node: Node, input: Any, dim: Any) -> sympy.Basic:
    """The running sum of a constant."""
    choice, shape = reader.choice(input, _shape(node)), _shape(node)
    _need(choice.predicate == sympy.true and choice.values[0].is_Integer)
    return _whole(node, choice.values[0] * (_along(shape, dim) + 1))


def _along(shape: Shape, dim: Any) -> Index:
    """The index along a dimension."""
    if not isinstance(dim, int) or not shape:
        raise Unreadable
    return axis(len(shape) - dim % len(shape))


def _difference(reader: Reader, node: Node, input: Any, n: Any = 1, dim: Any = -1, prepend: Any = None) -> sympy.Basic:
    """The step from each position to the next, where it is the same everywhere."""
    shape = _shape(input)
    _need(n == 1)
    place = _along(shape, dim)
    values = reader.integers(input, shape)
    step = sympy.expand(values - values.xreplace({place: place - 1}))
    _need(not step.free_symbols & {place} and not step.atoms(AppliedUndef))
    if prepend is not None:
        _need(_shape(prepend)[dim] == 1)
        first = values.xreplace({place: sympy.Integer(0)}) - reader.integers(prepend, shape)
        _need(sympy.expand(first - step) == 0)
    return _whole(node, step)


def _cast(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    expression, old, new = reader.operand(input, _shape(node)), _dtype(input), _dtype(node)
    if new == torch.bool:
        return nonzero(expression)
    if old == new or is_predicate(expression):
        return expression
    choice = as_choice(expression)
    if choice is not None:
        return _merged(node, _cases(choice))
    return _whole(node, reader.integers(input, _shape(node)))


def _same(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    return reader.operand(input, _shape(node))


def _reshape(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    _need(_dtype(input) == _dtype(node))
    old, new = reader.read(input), _shape(node)
    before, after = ([n for n, size in enumerate(shape) if size != 1] for shape in (old.shape, new))
    _need([old.shape[n] for n in before] == [new[n] for n in after])
    moved = {axis(len(old.shape) - b): axis(len(new) - a) for b, a in zip(before, after, strict=True)}
    return old.expression.xreplace(moved)


def _permute(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    operation = read_operation(node)
    if not isinstance(operation, Permuted):
        raise Unreadable
    old = reader.read(operation.source)
    rank = len(old.shape)
    return old.expression.xreplace({axis(rank - dim): axis(rank - n) for n, dim in enumerate(operation.order)})


def _concatenated(reader: Reader, node: Node, tensors: Any, dim: Any = 0) -> sympy.Basic:
    """Booleans one after another along `dim`."""
    shape = _shape(node)
    _need(_dtype(node) == torch.bool)
    place = _along(shape, dim)
    found, start = [], sympy.Integer(0)
    for tensor in tensors:
        end = start + _shape(tensor)[dim]
        part = _flag(reader.read(tensor).expression).xreplace({place: place - start})
        # Elsewhere a leaf has no such index.
        _need(not part.atoms(AppliedUndef))
        inside = [at_least_zero_within(place - start, shape), at_least_zero_within(end - 1 - place, shape)]
        found.append(sympy.And(*inside, part))
        start = end
    return sympy.Or(*found)


def _add_batch_dim(reader: Reader, node: Node, input: Any, dim: Any, number: Any) -> sympy.Basic:
    """The elements along the first dimension, which vmap hides from here on."""
    old = reader.read(input)
    _need(dim == 0)
    return old.expression.xreplace({axis(len(old.shape)): level(number)})


def _remove_batch_dim(reader: Reader, node: Node, input: Any, number: Any, size: Any, dim: Any) -> sympy.Basic:
    """The elements along all dimensions, of which the first is the one that vmap hid."""
    _need(dim == 0)
    return reader.read(input).expression.xreplace({level(number): axis(len(_shape(node)))})


def _getitem(reader: Reader, node: Node, source: Any, index: Any) -> sympy.Basic:
    _need(fake_tensor(source) is not None)
    old = reader.read(source)
    items = index if isinstance(index, tuple) else (index,)
    if any(fake_tensor(item) is not None for item in items):
        return old.expression.xreplace(_gathered(reader, items, old.shape, _shape(node)))
    return old.expression.xreplace(_sliced(reader, _without_ellipsis(items, len(old.shape)), old.shape, _shape(node)))


def _index(reader: Reader, node: Node, input: Any, indices: Any) -> sympy.Basic:
    return _getitem(reader, node, input, tuple(indices))


def _gathered(reader: Reader, items: tuple[Any, ...], old: Shape, new: Shape) -> dict[sympy.Basic, sympy.Basic]:
    _need(all(_dtype(item) in INTEGERS for item in items))
    # What is not indexed keeps its place from the right, unless an index has dimensions of its own.
    _need(len(items) == len(old) or not any(map(_shape, items)))
    places: dict[sympy.Basic, sympy.Basic] = {}
    for n, item in enumerate(items):
        place = reader.integers(item, new)
        ends = bounds(place, new)
        # A negative index counts from the end.
        _need(bool(place.is_nonnegative) or (ends is not None and bool(ends[0].is_nonnegative)))
        places[axis(len(old) - n)] = place
    return places


def _without_ellipsis(items: tuple[Any, ...], rank: int) -> list[Any]:
    taken = sum(item is not None and item is not Ellipsis for item in items)
    _need(taken <= rank)
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
            _need(isinstance(step, int))
            places[symbol] = _position(reader, item.start or 0, size) + step * axis(len(new) - target)
            target += 1
        else:
            places[symbol] = _position(reader, item, size)
    return places


def _position(reader: Reader, index: Any, size: sympy.Expr) -> sympy.Expr:
    _need(not isinstance(index, bool))
    place = reader.integer(index)
    if place.is_negative:
        place = size + place
    _need(bool(place.is_nonnegative) or is_nonnegative(index))
    return place


HANDLERS: dict[str, Handler] = {
    "arange": _arange,
    "tril": _tril,
    "triu": _triu,
    **dict.fromkeys(("le", "less_equal"), _comparison(operator.le, lambda a, b: b - a)),
    **dict.fromkeys(("lt", "less"), _comparison(operator.lt, lambda a, b: b - a - 1)),
    **dict.fromkeys(("ge", "greater_equal"), _comparison(operator.ge, lambda a, b: a - b)),
    **dict.fromkeys(("gt", "greater"), _comparison(operator.gt, lambda a, b: a - b - 1)),
    **dict.fromkeys(("eq", "__eq__"), _equal),
    **dict.fromkeys(("ne", "not_equal"), _not_equal),
    "add": _arithmetic(operator.add),
    **dict.fromkeys(("sub", "subtract"), _arithmetic(operator.sub)),
    **dict.fromkeys(("mul", "multiply"), _multiply),
    **dict.fromkeys(("neg", "negative"), _negative),
    **dict.fromkeys(("abs", "absolute"), _absolute),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _divide),
    **dict.fromkeys(("floordiv", "floor_divide"), _floor_divide),
    **dict.fromkeys(("mod", "remainder"), _remainder),
    "sqrt": _sqrt,
    "cumsum": _cumulative_sum,
    "diff": _difference,
    **dict.fromkeys(("transpose", "permute", "getattr"), _permute),
    "getitem": _getitem,
    "index": _index,
    "_add_batch_dim": _add_batch_dim,
    "_remove_batch_dim": _remove_batch_dim,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _ones),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _zeros),
    **dict.fromkeys(("tensor", "scalar_tensor"), _tensor),
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("full", "new_full", "full_like"), _full),
    **dict.fromkeys(("and_", "bitwise_and", "__and__"), _and),
    **dict.fromkeys(("or_", "bitwise_or", "__or__"), _or),
    "logical_and": _logical(sympy.And),
    "logical_or": _logical(sympy.Or),
    **dict.fromkeys(("invert", "inv", "bitwise_not", "__invert__"), _not),
    "logical_not": _logical_not,
    **dict.fromkeys(("to", "bool", "long", "int", "type", "type_as", "float", "half", "bfloat16"), _cast),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "clone", "contiguous", "detach"), _same),
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze"), _reshape),
}
