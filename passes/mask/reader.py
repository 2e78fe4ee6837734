"""Reads tensors of a graph as symbolic functions of their own indices.

What cannot be read becomes a *leaf*: an unknown function of its indices. So every reading is exact, and only says less
the more leaves it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.node_values import fake_tensor, symbolic, symbolic_shape
from ..graph.operation_names import operation_name, out_of_place
from ..graph.torch_internals import is_batched
from .expressions import INTEGERS, Choice, Shape, Unreadable, as_choice, as_sympy, axis, nonzero

Handler = Callable[..., sympy.Basic]


@dataclass(frozen=True)
class Reading:
    """The content of a tensor: an expression or predicate over its axes, and the shape that they run over."""

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


def _without_unit_axes(expression: sympy.Basic, shape: Shape) -> sympy.Basic:
    unit = {axis(len(shape) - place): sympy.Integer(0) for place, size in enumerate(shape) if size == 1}
    return expression.xreplace(unit) if unit else expression


def _broadcasts(shape: Shape, result: Shape) -> bool:
    if len(shape) > len(result):
        return False
    return all(size in (1, wide) for size, wide in zip(shape[::-1], result[::-1], strict=False))
