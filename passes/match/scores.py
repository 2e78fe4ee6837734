"""Walks from a softmax to the product of query and key, and collects what scales and masks the scores on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch.fx import Node

from ..graph.axes import Dim, Layout, Misaligned, is_size, leaves
from ..graph.node_values import are_tensors, fake_tensor
from ..graph.operation_names import operation_name
from ..graph.operations import (
    Clamped,
    Concatenated,
    Dropout,
    Expanded,
    Filled,
    Permuted,
    Product,
    Repeated,
    Same,
    Scaled,
    Sum,
    Tanh,
    Viewed,
)
from ..graph.read_operations import read_operation
from ..mask.mask_tensors import HIDDEN
from .score_masks import ScoreMask, operand_layout, separated
from .softmax import Reduction, find_reduction
from .walk import Factor, Walker, shape_of, source_layout

ACTIVE_DROPOUT = "dropout is active; call model.eval() or set its probability to 0"


class NotAttention(Exception):
    """The nodes that were followed are no attention."""


@dataclass
class Scores:
    """A product with what is done to it up to the softmax.

    Attributes:
        product: The product of query and key.
        node: Its node.
        layout: The axes of its dimensions.
        factors: What it is multiplied by, after the tanh if there is one.
        inner: What it is multiplied by before a tanh; None where there is none.
        sink: A logit beside those of the keys, and the axes of its dimensions; None where there is none.
        masks: What masks it.
        is_shifted: Whether something was added that a softmax takes out again.
        nodes: The nodes between the product and the softmax, the product included.
        passed: Nodes between masks and what they are made from.
        obstacles: Why it cannot become the operator, in sentences.
    """

    product: Product
    node: Node
    layout: Layout
    factors: list[Factor] = field(default_factory=list)
    inner: list[Factor] | None = None
    sink: tuple[Node, Layout] | None = None
    masks: list[ScoreMask] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    passed: list[Node] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    is_shifted: bool = False

    def scale(self, factor: Factor) -> None:
        """Multiply the scores, masked as they are so far."""
        self.factors.append(factor)
        if self.sink is not None:
            self.obstacles.append("the scores and their sink are scaled together; scale the scores first")
        known = factor.number if factor.number is not None and factor.number > 0 else None
        for mask in self.masks:
            mask.value = None if known is None or mask.value is None else mask.value * known
            mask.least = mask.least * known if known is not None else mask.least


class ScoreWalk:
    """Walks from one softmax to its product.

    Args:
        walker: Of the graph.
        summed: The axes that the softmax runs over.
        kept: Those of its result that are used, and where they start, if these are not all.
    """

    def __init__(self, walker: Walker, summed: Dim, kept: tuple[Dim, int] | None) -> None:
        self.walker, self.summed, self.kept = walker, summed, kept

    def find(self, node: Node, layout: Layout, user: Node) -> Scores:
        """The product that a node, as `user` reads it, is made from.

        Raises:
            NotAttention: It is made from none.
        """
        obstacles: list[str] = []
        node = self.walker.current(node, user, obstacles)
        try:
            found = self._step(node, layout)
        except Misaligned:
            raise NotAttention from None
        found.nodes.append(node)
        found.obstacles += obstacles
        return found

    def _step(self, node: Node, layout: Layout) -> Scores:
        operation = read_operation(node)
        if isinstance(operation, Product):
            return self._product(operation, node, layout)
        handler = self._handlers.get(type(operation))
        if handler is not None:
            return handler(self, operation, node, layout)
        if not isinstance(operation, (Viewed, Permuted, Expanded, Repeated)):
            raise NotAttention
        return self.find(operation.source, source_layout(operation, node, layout, operation.source), node)

    def _product(self, product: Product, node: Node, layout: Layout) -> Scores:
        found = Scores(product, node, layout)
        factor = self.walker.factor(product.scale)
        if factor is None:
            found.obstacles.append(f"the scale is computed from tensors ({product.scale}); pass a number")
        elif factor != 1:
            found.factors.append(Factor(factor))
        if product.bias is not None:
            self._add(found, node, layout, product.bias, self.walker.factor(product.bias_scale))
        return found

    def _same(self, same: Same, node: Node, layout: Layout) -> Scores:
        return self.find(same.source, layout, node)

    def _dropout(self, dropout: Dropout, node: Node, layout: Layout) -> Scores:
        found = self.find(dropout.source, layout, node)
        found.obstacles.append(ACTIVE_DROPOUT)
        return found

    def _sum(self, total: Sum, node: Node, layout: Layout) -> Scores:
        orders = [(total.left, total.right)] + [(total.right, total.left)] * (total.sign == 1)
        found, other = self._first(orders, node, layout)
        largest = self._maximum(total, node, layout)
        if largest is None:
            self._add(found, node, layout, other, float(total.sign))
        else:
            found.is_shifted = True
            found.passed += largest.nodes
        return found

    def _maximum(self, total: Sum, node: Node, layout: Layout) -> Reduction | None:
        """The maximum over the keys, if a sum is of scores less their own: a softmax takes it out again."""
        if total.sign != -1 or not are_tensors(total.left, total.right):
            return None
        found = find_reduction(self.walker.value(total.right, node), "max", "amax")
        if found is None or leaves(layout[found.dim]) != leaves(self.summed):
            return None
        compared = self.walker.value(found.source, found.nodes[-1])
        return found if compared is self.walker.value(total.left, node) else None

    def _clamped(self, clamped: Clamped, node: Node, layout: Layout) -> Scores:
        """Scores of which only those are raised that stay hidden."""
        found, other = self._first([(clamped.source, clamped.least), (clamped.least, clamped.source)], node, layout)
        least = self.walker.factor(other)
        if not isinstance(least, float) or least > HIDDEN:
            found.obstacles.append("the scores are clamped to numbers that do not hide a key")
        else:
            for mask in found.masks:
                mask.least = max(mask.least, least)
        return found

    def _tanh(self, tanh: Tanh, node: Node, layout: Layout) -> Scores:
        found = self.find(tanh.source, layout, node)
        if found.inner is not None or found.masks or found.sink is not None or found.is_shifted:
            found.obstacles.append("the scores are capped by tanh after more than scaling; mask them afterwards")
        found.inner, found.factors = found.factors, []
        return found

    def _concatenated(self, joined: Concatenated, node: Node, layout: Layout) -> Scores:
        """Scores beside a logit that is dropped after the softmax."""
        if self.kept is None or leaves(layout[joined.dim]) != leaves(self.summed) or len(joined.sources) != 2:
            raise NotAttention
        keys, start = self.kept
        scores, sink = joined.sources if start == 0 else joined.sources[::-1]
        count = math.prod(axis.size for axis in leaves(keys))
        if start > 1 or not is_size(shape_of(sink)[joined.dim], 1) or not is_size(shape_of(scores)[joined.dim], count):
            raise NotAttention
        found = self.find(scores, (*layout[: joined.dim], keys, *layout[joined.dim + 1 :]), node)
        found.sink = sink, (*layout[: joined.dim], (), *layout[joined.dim + 1 :])
        return found

    def _scaled(self, scaled: Scaled, node: Node, layout: Layout) -> Scores:
        orders = [(scaled.source, scaled.factor)] + [(scaled.factor, scaled.source)] * (not scaled.inverted)
        found, other = self._first(orders, node, layout)
        factor = self.walker.factor(other)
        if factor is None:
            found.obstacles.append(
                "the scores are scaled by a tensor with content, or by one that is changed in place; use a number"
            )
        elif factor == 0 or not math.isfinite(factor if isinstance(factor, float) else 1):
            found.obstacles.append(f"the scores are scaled by {factor}; use another number")
        else:
            found.scale(Factor(factor, scaled.inverted))
        return found

    def _filled(self, filled: Filled, node: Node, layout: Layout) -> Scores:
        found, other = self._first([(filled.source, filled.value), (filled.value, filled.source)], node, layout)
        keep = filled.keep if other is filled.value else not filled.keep
        value = self.walker.factor(other)
        known = value if isinstance(value, float) else None
        self._mask(found, ScoreMask(filled.mask, node, operand_layout(node, layout, filled.mask), keep, known))
        return found

    def _first(self, orders: list[tuple[Any, Any]], node: Node, layout: Layout) -> tuple[Scores, Any]:
        """The scores and the other operand of an operation, in the first order in which there are scores."""
        for source, other in orders:
            if fake_tensor(source) is not None:
                try:
                    return self.find(source, operand_layout(node, layout, source), node), other
                except (NotAttention, Misaligned):
                    continue
        raise NotAttention

    def _add(self, found: Scores, node: Node, layout: Layout, other: Any, factor: float | Node | None) -> None:
        """Note what is added to scores; a number that is added to all of them changes nothing."""
        found.is_shifted = True
        if factor == 0 and operation_name(other) in ("empty", "new_empty", "empty_like"):
            found.passed.append(other)
        elif fake_tensor(other) is not None and factor != 0:
            known = factor if isinstance(factor, float) else None
            self._mask(found, ScoreMask(other, node, operand_layout(node, layout, other), None, known))

    def _mask(self, found: Scores, mask: ScoreMask) -> None:
        masks, passed = separated(self.walker, mask)
        found.masks += masks
        found.passed += passed

    _handlers: ClassVar[dict[type, Callable[..., Scores]]] = {
        Same: _same,
        Dropout: _dropout,
        Sum: _sum,
        Scaled: _scaled,
        Filled: _filled,
        Clamped: _clamped,
        Tanh: _tanh,
        Concatenated: _concatenated,
    }
