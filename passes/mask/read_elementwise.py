"""How elementwise operations are read: arithmetic, comparisons, logic, selection and casts."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.node_values import is_floating
from .clauses import is_zero
from .constants import computed
from .expressions import (
    Choice,
    Index,
    Shape,
    Unreadable,
    as_choice,
    at_least_zero_within,
    cases,
    is_predicate,
    nonzero,
    where,
)
from .handler_tools import combined, dtype_of, flag, merged, need, numeric_cases, selected, symbolic_shape_of
from .integers import compared, exact, whole
from .reader import Handler, Reader


def _where(reader: Reader, node: Node, condition: Any, input: Any, other: Any) -> sympy.Basic:
    if node.op == "call_method":
        condition, input = input, condition
    return _filled(reader, node, flag(reader.operand(condition, symbolic_shape_of(node))), input, other)


def _masked_fill(reader: Reader, node: Node, input: Any, mask: Any, value: Any) -> sympy.Basic:
    return _filled(reader, node, sympy.Not(flag(reader.operand(mask, symbolic_shape_of(node)))), input, value)


def _filled(reader: Reader, node: Node, predicate: Boolean, first: Any, second: Any) -> sympy.Basic:
    shape = symbolic_shape_of(node)
    return selected(node, predicate, reader.choice(first, shape), reader.choice(second, shape))


def _comparison(compare: Callable[..., Any], form: Callable[[Any, Any], Any]) -> Handler:
    """The handler of a comparison that holds where `form` of both operands is at least zero."""

    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = symbolic_shape_of(node)
        if is_floating(input) or is_floating(other) or isinstance(other, float):
            return _tested(compare, input, other, reader.choice(input, shape), reader.choice(other, shape))
        return _at_least_zero(sympy.expand(form(*compared(reader, shape, input, other, exact))), shape)

    return handler


def _tested(compare: Callable[..., Any], input: Any, other: Any, left: Choice, right: Choice) -> Boolean:
    """Where two numbers pass a comparison with one."""
    need(right.predicate == sympy.true)
    return where(left, lambda value: bool(computed(compare, (value, input), (right.values[0], other))))


def _at_least_zero(difference: sympy.Expr, shape: Shape) -> Boolean:
    distance = next((term for term in difference.atoms(sympy.Abs) if term.atoms(Index)), None)
    if distance is None:
        return at_least_zero_within(difference, shape)
    both = (_at_least_zero(difference.xreplace({distance: sign * distance.args[0]}), shape) for sign in (1, -1))
    return (sympy.Or if difference.coeff(distance) > 0 else sympy.And)(*both)


def _equal(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = symbolic_shape_of(node)
    left, right = reader.operand(input, shape), reader.operand(other, shape)
    if is_predicate(left) and is_predicate(right):
        return sympy.Or(sympy.And(left, right), sympy.And(sympy.Not(left), sympy.Not(right)))
    choices = as_choice(left), as_choice(right)
    if choices[0] is not None and choices[1] is not None:
        return _tested(torch.eq, input, other, choices[0], choices[1])
    return is_zero(operator.sub(*compared(reader, shape, input, other, Reader.integers)))


def _not_equal(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return sympy.Not(_equal(reader, node, input, other))


def _and(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = symbolic_shape_of(node)
    return sympy.And(flag(reader.operand(input, shape)), flag(reader.operand(other, shape)))


def _or(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = symbolic_shape_of(node)
    return sympy.Or(flag(reader.operand(input, shape)), flag(reader.operand(other, shape)))


def _logical(form: Callable[..., Boolean]) -> Handler:
    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = symbolic_shape_of(node)
        return form(reader.predicate(input, shape), reader.predicate(other, shape))

    return handler


def _not(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    need(dtype_of(input) == torch.bool)
    return sympy.Not(reader.predicate(input, symbolic_shape_of(node)))


def _logical_not(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    return sympy.Not(reader.predicate(input, symbolic_shape_of(node)))


def _arithmetic(form: Callable[[Any, Any], Any]) -> Handler:
    def handler(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
        shape = symbolic_shape_of(node)
        need(dtype_of(node) != torch.bool)
        if is_floating(node) or torch.bool in (dtype_of(input), dtype_of(other)):
            return combined(reader, node, form, input, other)
        return whole(node, form(reader.integers(input, shape), reader.integers(other, shape)))

    return handler


def _multiply(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    shape = symbolic_shape_of(node)
    if dtype_of(node) == torch.bool:
        return _and(reader, node, input, other)
    if is_floating(node):
        return combined(reader, node, operator.mul, input, other)
    factors = reader.integers(input, shape), reader.integers(other, shape)
    need(any(factor.is_Integer for factor in factors))
    return whole(node, factors[0] * factors[1])


def _negative(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    return _multiply(reader, node, input, -1)


def _absolute(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    expression = reader.integers(input, symbolic_shape_of(node))
    need(not expression.atoms(AppliedUndef))
    return whole(node, sympy.Abs(expression))


def _divide(reader: Reader, node: Node, input: Any, other: Any, *, rounding_mode: Any = None) -> sympy.Basic:
    if rounding_mode == "floor":
        return _floor_divide(reader, node, input, other)
    need(rounding_mode is None and 0 not in reader.choice(other, symbolic_shape_of(node)).values)
    return combined(reader, node, operator.truediv, input, other)


def _floor_divide(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return whole(node, sympy.floor(exact(reader, input, symbolic_shape_of(node)) / _divisor(other)))


def _remainder(reader: Reader, node: Node, input: Any, other: Any) -> sympy.Basic:
    return whole(node, sympy.Mod(exact(reader, input, symbolic_shape_of(node)), _divisor(other)))


def _divisor(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise Unreadable
    return value


def _sqrt(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    choice = reader.choice(input, symbolic_shape_of(node))
    return merged(node, [(place, computed(torch.sqrt, (value, input))) for place, value in cases(choice)])


def _cast(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    expression, old, new = reader.operand(input, symbolic_shape_of(node)), dtype_of(input), dtype_of(node)
    if new == torch.bool:
        return nonzero(expression)
    if old == new or is_predicate(expression):
        return expression
    choice = as_choice(expression)
    if choice is not None:
        return merged(node, numeric_cases(choice))
    return whole(node, reader.integers(input, symbolic_shape_of(node)))


HANDLERS: dict[str, Handler] = {
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys(("le", "less_equal"), _comparison(operator.le, lambda a, b: b - a)),
    **dict.fromkeys(("lt", "less"), _comparison(operator.lt, lambda a, b: b - a - 1)),
    **dict.fromkeys(("ge", "greater_equal"), _comparison(operator.ge, lambda a, b: a - b)),
    **dict.fromkeys(("gt", "greater"), _comparison(operator.gt, lambda a, b: a - b - 1)),
    **dict.fromkeys(("eq", "__eq__"), _equal),
    **dict.fromkeys(("ne", "not_equal"), _not_equal),
    **dict.fromkeys(("and_", "bitwise_and", "__and__"), _and),
    **dict.fromkeys(("or_", "bitwise_or", "__or__"), _or),
    "logical_and": _logical(sympy.And),
    "logical_or": _logical(sympy.Or),
    **dict.fromkeys(("invert", "inv", "bitwise_not", "__invert__"), _not),
    "logical_not": _logical_not,
    "add": _arithmetic(operator.add),
    **dict.fromkeys(("sub", "subtract"), _arithmetic(operator.sub)),
    **dict.fromkeys(("mul", "multiply"), _multiply),
    **dict.fromkeys(("neg", "negative"), _negative),
    **dict.fromkeys(("abs", "absolute"), _absolute),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _divide),
    **dict.fromkeys(("floordiv", "floor_divide"), _floor_divide),
    **dict.fromkeys(("mod", "remainder"), _remainder),
    "sqrt": _sqrt,
    **dict.fromkeys(("to", "bool", "long", "int", "type", "type_as", "float", "half", "bfloat16"), _cast),
}
"""The handlers by the names of operations."""
