"""Walks up a graph: the value that a node holds when it is read, and the nodes that an operand is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..graph.axes import Layout, Misaligned, Size, broadcast, leaves, take, viewed
from ..graph.mutation import Writes
from ..graph.node_values import fake_tensor, needs_gradients, number
from ..graph.operations import Expanded, Operation, Permuted, Repeated, Same, Scaled, Viewed
from ..graph.read_operations import read_operation
from ..mask.reader import Reader


class Changed(Exception):
    """A tensor is changed in place in a way that cannot be followed."""


@dataclass(frozen=True)
class Factor:
    """A number, or a node that holds one, that multiplies or, where `inverted`, divides."""

    value: float | Node
    inverted: bool = False

    @property
    def number(self) -> float | None:
        """The factor as one number, if it is known."""
        if isinstance(self.value, Node):
            return None
        return 1 / self.value if self.inverted else self.value


@dataclass(frozen=True)
class Operand:
    """A node that an operand is made from, as the operand is `node`, laid out otherwise, times `factors`.

    Attributes:
        layout: The axes of the node's dimensions.
        passed: The nodes between this one and the operand.
    """

    node: Node
    layout: Layout
    factors: tuple[Factor, ...] = ()
    passed: tuple[Node, ...] = ()

    @property
    def tensor(self) -> torch.Tensor:
        """The fake tensor of the node."""
        tensor = fake_tensor(self.node)
        assert tensor is not None
        return tensor


class Walker:
    """Walks up one graph."""

    def __init__(self, writes: Writes, reader: Reader) -> None:
        self.reader = reader
        self._writes = writes

    def value(self, node: Node, user: Node) -> Node:
        """The node whose result `node` holds when `user` reads it.

        Raises:
            Changed: Something else was written to a part of it.
        """
        writers = [writer for writer in self._writes.to(node) if node < writer < user]
        if not writers:
            return node
        if _geometry(writers[-1]) != _geometry(node):
            raise Changed(f"{node.name} is changed in place through a view; compute a new tensor instead")
        return writers[-1]

    def current(self, node: Node, user: Node, obstacles: list[str]) -> Node:
        """`value`, or the node itself and one more obstacle."""
        try:
            return self.value(node, user)
        except Changed as changed:
            obstacles.append(str(changed))
            return node

    def is_changed(self, node: Node, after: Node, until: Node) -> bool:
        """Whether a tensor is written to between two nodes."""
        return any(after < writer < until for writer in self._writes.to(node))

    def is_ever_changed(self, node: Node) -> bool:
        """Whether a tensor, or anything that it is read from, is written to."""
        return any(map(self.is_written, self.reader.sources(node)))

    def is_written(self, node: Node) -> bool:
        """Whether a tensor is written to anywhere."""
        return bool(self._writes.to(node))

    def factor(self, value: Any) -> float | Node | None:
        """A number that is known, or a node that holds one while the graph runs; None for other tensors."""
        if fake_tensor(value) is None:
            return number(value)
        known = self.reader.number(value)
        return None if self.is_ever_changed(value) else known

    def operands(self, node: Node, layout: Layout, until: Node, scaled: bool = True) -> list[Operand]:
        """The nodes that an operand is made from by views, casts and scaling, beginning with the operand itself.

        Args:
            node: The operand.
            layout: The axes of its dimensions.
            until: The node that reads them; a tensor that is written to before is not among them.
            scaled: Whether scaling is followed.
        """
        found = [Operand(node, layout)]
        while True:
            source = self._source(found[-1], until)
            if source is None or (source.factors and not scaled):
                return found
            found.append(source)

    def _source(self, operand: Operand, until: Node) -> Operand | None:
        operation = read_operation(operand.node)
        if operation is None or self.is_changed(operand.node, operand.node, until):
            return None
        factors = operand.factors
        if isinstance(operation, Scaled):
            scaled = self.scaled(operation)
            if scaled is None:
                return None
            node, factor = scaled
            factors = (*factors, factor)
        elif isinstance(operation, (Viewed, Permuted, Expanded, Repeated, Same)):
            node = operation.source
        else:
            return None
        if self.is_changed(node, node, until) or not _widened(node, operand.node) or _is_cut(node, operand.node):
            return None
        try:
            layout = source_layout(operation, operand.node, operand.layout, node)
        except Misaligned:
            return None
        return replace(operand, node=node, layout=layout, factors=factors, passed=(*operand.passed, operand.node))

    def scaled(self, operation: Scaled) -> tuple[Node, Factor] | None:
        """The tensor and the number of a product or quotient, if it has both."""
        pairs = [(operation.source, operation.factor)]
        if not operation.inverted:
            pairs.append((operation.factor, operation.source))
        for source, value in pairs:
            factor = self.factor(value)
            if factor is not None and fake_tensor(source) is not None and (factor != 0 or not operation.inverted):
                return source, Factor(factor, operation.inverted)
        return None


def shape_of(node: Node) -> Sequence[Size]:
    """The shape of a node's tensor.

    Raises:
        Misaligned: It is not known.
    """
    tensor = fake_tensor(node)
    if tensor is None:
        raise Misaligned
    return tensor.shape


def source_layout(operation: Operation, node: Node, layout: Layout, source: Node) -> Layout:
    """The axes of an operation's source, from those of its result.

    Raises:
        Misaligned: They cannot be identified.
    """
    shape, result = shape_of(source), shape_of(node)
    if isinstance(operation, Viewed):
        return viewed(layout, shape)
    if isinstance(operation, Permuted):
        return tuple(layout[operation.order.index(place)] for place in range(len(shape)))
    if isinstance(operation, Repeated):
        return _before_repeat(layout, operation.dim, shape[operation.dim])
    return broadcast(layout, result, shape)


def _before_repeat(layout: Layout, dim: int, size: Size) -> Layout:
    """The layout before each element along `dim`, of which there are `size`, was repeated in place."""
    return (*layout[:dim], take(size, list(leaves(layout[dim]))), *layout[dim + 1 :])


def _geometry(node: Node) -> tuple[Any, ...] | None:
    tensor = fake_tensor(node)
    return None if tensor is None else (tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset())


def _is_cut(source: Node, node: Node) -> bool:
    """Whether gradients of a node do not reach its source, as after `detach`."""
    return needs_gradients(source) and not needs_gradients(node)


def _widened(source: Node, node: Node) -> bool:
    """Whether a node has the dtype of its source, or a wider one of the same kind."""
    old, new = fake_tensor(source), fake_tensor(node)
    if old is None or new is None or old.is_floating_point() != new.is_floating_point():
        return False
    return old.dtype == new.dtype or (
        old.is_floating_point() and torch.promote_types(old.dtype, new.dtype) == new.dtype
    )
