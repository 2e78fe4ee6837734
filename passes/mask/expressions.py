"""Symbolic values of tensors: expressions and predicates over their indices, and choices of two numbers.

A tensor of integers is a sympy expression over `axis(1)`, its last index, `axis(2)`, the one before, and so on; a
tensor of booleans, or of zeros and ones, is a sympy predicate; one of a single floating point number is that number,
and one of two numbers a `Choice`. Axes are counted from the right so that broadcasting changes no expression: an axis
of size 1 never occurs in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sympy
import torch
from sympy.logic.boolalg import Boolean

from .clauses import at_least_zero, is_zero

INTEGERS = (torch.int32, torch.int64)
Shape = tuple[sympy.Expr, ...]


class Index(sympy.Symbol):
    """The index along a dimension."""


def axis(place: int) -> Index:
    """The index along the axis that is `place`-th from the right, starting at 1."""
    return Index(f"axis{place}", integer=True, nonnegative=True)


KEY, QUERY, HEAD, BATCH = (axis(place) for place in range(1, 5))
"""The indices along the axes of scores."""
AXES = (BATCH, HEAD, QUERY, KEY)
"""The same in the order of the dimensions."""
OTHER_AXES = tuple(axis(place) for place in range(5, 13))
"""The indices along dimensions that are none of `AXES`."""


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


def as_sympy(value: float) -> sympy.Expr:
    """A number, as an integer where it is one."""
    if isinstance(value, int):
        return sympy.Integer(value)
    return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**53 else sympy.Float(value)


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
