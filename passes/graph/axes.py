"""Dimensions of tensors by identity, so that views, transposes and products of any spelling compare.

Each dimension is a tuple of axes, in row-major order; a dimension of size 1 has none. An axis that turns out to be
a product, as [batch * heads] does where it is viewed as [batch, heads], is split wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .node_values import symbolic_size

Size = int | torch.SymInt
Step = tuple[str, tuple[Any, ...]]
"""A tensor method and its arguments."""


class Misaligned(Exception):
    """Dimensions cannot be identified, or not be put in the order that is asked for."""


@dataclass(eq=False)
class Axis:
    """A dimension, or a factor of one; compared by identity."""

    size: Size
    parts: tuple[Axis, ...] = ()

    def split(self, size: Size) -> tuple[Axis, ...]:
        """Two factors in row-major order, of which the first has `size`."""
        self.parts = (Axis(size), Axis(_known(self.size // size)))
        return self.parts


def _known(size: Size) -> Size:
    """A size as a number, if it is one."""
    expression = symbolic_size(size)
    return int(expression) if expression.is_Integer else size


Dim = tuple[Axis, ...]
Layout = tuple[Dim, ...]


def leaves(axes: Iterable[Axis]) -> Dim:
    """The axes, with split ones replaced by their factors."""
    return tuple(leaf for axis in axes for leaf in (leaves(axis.parts) if axis.parts else (axis,)))


def all_leaves(layout: Layout) -> Dim:
    """The leaves of all dimensions in order."""
    return tuple(leaf for dim in layout for leaf in leaves(dim))


def fresh(shape: Iterable[Size]) -> Layout:
    """A new axis for each dimension."""
    return tuple(() if is_size(size, 1) else (Axis(size),) for size in shape)


def is_size(size: Size, other: Size) -> bool:
    """Whether two sizes are known to be equal."""
    return symbolic_size(size) == symbolic_size(other)


def broadcast(layout: Layout, shape: Sequence[Size], operand: Sequence[Size]) -> Layout:
    """The layout of an operand that broadcasts to `shape`, whose dimensions are `layout`.

    Raises:
        Misaligned: It is not known which dimensions broadcast.
    """
    skipped = len(shape) - len(operand)
    if skipped < 0:
        raise Misaligned
    pairs = zip(layout[skipped:], shape[skipped:], operand, strict=True)
    return tuple(_broadcast(dim, size, own) for dim, size, own in pairs)


def _broadcast(dim: Dim, size: Size, operand: Size) -> Dim:
    if is_size(operand, 1):
        return ()
    if not is_size(operand, size):
        raise Misaligned
    return dim


def viewed(layout: Layout, shape: Iterable[Size]) -> Layout:
    """The layout of a tensor of `shape` that holds the elements of `layout` in the same order.

    Raises:
        Misaligned: A dimension of `shape` is no product of whole dimensions or factors of them.
    """
    pending = list(all_leaves(layout))
    result = tuple(take(size, pending) for size in shape)
    if pending:
        raise Misaligned
    return result


def take(size: Size, pending: list[Axis]) -> Dim:
    """Remove axes from the front of `pending` whose product is `size`.

    Raises:
        Misaligned: There are none, or one of them is empty, so that products do not distinguish axes.
    """
    taken: list[Axis] = []
    while not is_size(size, 1):
        if not pending:
            raise Misaligned
        axis = pending.pop(0)
        if is_size(axis.size, 0) or is_size(size, 0):
            raise Misaligned
        if not _divides(axis.size, size):
            if not _divides(size, axis.size):
                raise Misaligned
            axis, rest = axis.split(size)
            pending.insert(0, rest)
        taken.append(axis)
        size = _known(size // axis.size)
    return tuple(taken)


def _divides(divisor: Size, size: Size) -> bool:
    return sympy.denom(sympy.cancel(symbolic_size(size) / symbolic_size(divisor))) == 1


def relayout(source: Layout, target: Layout) -> list[Step]:
    """The tensor methods, with their arguments, that turn `source` into `target`.

    Raises:
        Misaligned: The two have other axes, or a size is only known at run time and needed.
    """
    if tuple(map(leaves, source)) == tuple(map(leaves, target)):
        return []
    flat, wanted = all_leaves(source), all_leaves(target)
    if len(flat) != len(wanted) or set(flat) != set(wanted):
        raise Misaligned
    steps = [step for place in reversed(range(len(source))) for step in _apart(place, leaves(source[place]))]
    order = tuple(flat.index(axis) for axis in wanted)
    if order != tuple(range(len(order))):
        steps.append(("permute", order))
    return [*steps, *(step for place, dim in enumerate(target) for step in _together(place, leaves(dim)))]


def _apart(place: int, dim: Dim) -> list[Step]:
    if not dim:
        return [("squeeze", (place,))]
    return [("unflatten", (place, _sizes(dim)))] if len(dim) > 1 else []


def _together(place: int, dim: Dim) -> list[Step]:
    if not dim:
        return [("unsqueeze", (place,))]
    return [("flatten", (place, place + len(dim) - 1))] if len(dim) > 1 else []


def _sizes(dim: Dim) -> tuple[int, ...]:
    sizes = tuple(axis.size if isinstance(axis.size, int) else -1 for axis in dim)
    if sizes.count(-1) > 1:
        raise Misaligned
    return sizes


def with_steps(node: Node, steps: Iterable[Step]) -> Node:
    """The result of tensor methods that are called one after another, written at the insertion point of the graph."""
    for name, arguments in steps:
        node = node.graph.call_method(name, (node, *arguments))
    return node
