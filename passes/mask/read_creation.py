"""How operations are read that make tensors of numbers: constants, ranges, triangles, running sums and differences."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from .expressions import Choice, Unreadable, at_least_zero_within, axis
from .handler_tools import index_along, merged, need, selected, symbolic_shape_of
from .integers import whole
from .reader import Handler, Reader

_ZEROS = Choice(sympy.true, sympy.Integer(0), sympy.Integer(0))


def _arange(
    reader: Reader, node: Node, *limits: Any, start: Any = 0, end: Any = None, step: Any = 1, **_: Any
) -> sympy.Basic:
    if len(limits) > 1:
        start = limits[0]
    if len(limits) > 2:
        step = limits[2]
    need(isinstance(step, int))
    return whole(node, reader.integer(start) + step * axis(1))


def _ones(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    return sympy.true


def _zeros(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    return sympy.false


def _full(reader: Reader, node: Node, *args: Any, fill_value: Any = None, **_: Any) -> sympy.Basic:
    value = args[-1] if fill_value is None else fill_value
    need(isinstance(value, (bool, int, float)))
    return merged(node, [(sympy.true, value)])


def _tensor(reader: Reader, node: Node, data: Any, **_: Any) -> sympy.Basic:
    return _full(reader, node, data)


def _literal(reader: Reader, node: Node, input: Any) -> sympy.Basic:
    """A number that is written in a program, which export stores as a tensor and copies at each use."""
    need(isinstance(input, Node) and input.op == "get_attr")
    try:
        value = attrgetter(input.target)(input.graph.owning_module)
    except AttributeError:
        raise Unreadable from None
    need(type(value) is torch.Tensor and value.numel() == 1)
    return merged(node, [(sympy.true, value.item())])


def _triangle(reader: Reader, node: Node, input: Any, diagonal: Any, sign: int) -> sympy.Basic:
    shape = symbolic_shape_of(node)
    below = axis(2) + reader.integer(diagonal) - axis(1)
    return selected(node, at_least_zero_within(sign * below, shape), reader.choice(input, shape), _ZEROS)


def _tril(reader: Reader, node: Node, input: Any, diagonal: Any = 0) -> sympy.Basic:
    return _triangle(reader, node, input, diagonal, 1)


def _triu(reader: Reader, node: Node, input: Any, diagonal: Any = 0) -> sympy.Basic:
    return _triangle(reader, node, input, diagonal, -1)


def _cumulative_sum(reader: Reader, node: Node, input: Any, dim: Any) -> sympy.Basic:
    """The running sum of a constant."""
    choice, shape = reader.choice(input, symbolic_shape_of(node)), symbolic_shape_of(node)
    need(choice.predicate == sympy.true and choice.values[0].is_Integer)
    return whole(node, choice.values[0] * (index_along(shape, dim) + 1))


def _difference(reader: Reader, node: Node, input: Any, n: Any = 1, dim: Any = -1, prepend: Any = None) -> sympy.Basic:
    """The step from each position to the next, where it is the same everywhere."""
    shape = symbolic_shape_of(input)
    need(n == 1)
    place = index_along(shape, dim)
    values = reader.integers(input, shape)
    step = sympy.expand(values - values.xreplace({place: place - 1}))
    need(not step.free_symbols & {place} and not step.atoms(AppliedUndef))
    if prepend is not None:
        need(symbolic_shape_of(prepend)[dim] == 1)
        first = values.xreplace({place: sympy.Integer(0)}) - reader.integers(prepend, shape)
        need(sympy.expand(first - step) == 0)
    return whole(node, step)


HANDLERS: dict[str, Handler] = {
    "arange": _arange,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _ones),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _zeros),
    **dict.fromkeys(("full", "new_full", "full_like"), _full),
    **dict.fromkeys(("tensor", "scalar_tensor"), _tensor),
    **dict.fromkeys(("lift_fresh", "lift_fresh_copy"), _literal),
    "tril": _tril,
    "triu": _triu,
    "cumsum": _cumulative_sum,
    "diff": _difference,
}
"""The handlers by the names of operations."""
