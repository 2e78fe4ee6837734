"""Helpers that the handlers of operations share: shapes and dtypes, and results that are made of two numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.node_values import fake_tensor, symbolic_shape
from .constants import Number, as_number, computed, held
from .expressions import Choice, Index, Shape, Unreadable, axis, cases, is_predicate, merge
from .reader import Reader


def symbolic_shape_of(node: Any) -> Shape:
    """The shape of a node's tensor.

    Raises:
        Unreadable: It is not known.
    """
    tensor = fake_tensor(node)
    if tensor is None:
        raise Unreadable
    return symbolic_shape(tensor)


def dtype_of(node: Any) -> torch.dtype | None:
    """The dtype of a node's tensor; None where it is not known."""
    tensor = fake_tensor(node)
    return None if tensor is None else tensor.dtype


def need(holds: bool) -> None:
    """Raise Unreadable unless a condition holds."""
    if not holds:
        raise Unreadable


def flag(expression: sympy.Basic) -> Boolean:
    """A predicate, or a constant 0 or 1, as a predicate.

    Raises:
        Unreadable: It is another number.
    """
    if expression in (0, 1):
        return sympy.true if expression == 1 else sympy.false
    need(is_predicate(expression))
    return expression


def index_along(shape: Shape, dim: Any) -> Index:
    """The index along a dimension."""
    if not isinstance(dim, int) or not shape:
        raise Unreadable
    return axis(len(shape) - dim % len(shape))


def merged(node: Any, found: Iterable[tuple[Boolean, Number]]) -> sympy.Basic:
    """The reading of a node from the numbers that stand where predicates hold, as its dtype holds them."""
    dtype = dtype_of(node)
    if dtype is None:
        raise Unreadable
    return merge((predicate, held(value, dtype)) for predicate, value in found)


def numeric_cases(choice: Choice) -> list[tuple[Boolean, Number]]:
    """The `cases` of a choice with numbers of Python."""
    return [(predicate, as_number(value)) for predicate, value in cases(choice)]


def combined(reader: Reader, node: Node, form: Callable[..., Any], input: Any, other: Any) -> sympy.Basic:
    """The reading of an operation on two operands, each of two numbers."""
    shape = symbolic_shape_of(node)
    return merged(
        node,
        [
            (sympy.And(in_first, in_second), computed(form, (first, input), (second, other)))
            for in_first, first in cases(reader.choice(input, shape))
            for in_second, second in cases(reader.choice(other, shape))
        ],
    )


def selected(node: Node, predicate: Boolean, first: Choice, second: Choice) -> sympy.Basic:
    """The reading of one choice where a predicate holds and another elsewhere."""
    inside = [(sympy.And(predicate, place), value) for place, value in numeric_cases(first)]
    outside = [(sympy.And(sympy.Not(predicate), place), value) for place, value in numeric_cases(second)]
    return merged(node, inside + outside)
