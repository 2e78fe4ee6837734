"""Masks of scores with the axes of their dimensions, traced back to the tensors that they are made from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch.fx import Node

from ..graph.axes import Layout, broadcast, leaves
from ..graph.node_values import are_tensors
from ..graph.operations import Sum
from ..graph.read_operations import read_operation
from ..mask.expressions import AXES, OTHER_AXES
from ..mask.mask_tensors import MaskTensor
from .walk import Walker, shape_of


@dataclass
class ScoreMask:
    """A mask of scores, before it is read.

    Attributes:
        node: A boolean tensor, or one that is added.
        user: The node that reads it.
        layout: The axes of its dimensions.
        keep: Whether scores stay where the mask is true, or are filled there; None for a mask that is added.
        value: What the scores are filled with, or what an added mask is multiplied by; None if it is not known.
        least: What lesser scores are raised to afterwards.
    """

    node: Node
    user: Node
    layout: Layout
    keep: bool | None
    value: float | None
    least: float = -math.inf


def separated(walker: Walker, mask: ScoreMask) -> tuple[list[ScoreMask], list[Node]]:
    """The masks that a mask is made from by views, scaling and sums, and the nodes in between.

    Raises:
        Misaligned: The dimensions of a sum cannot be identified.
    """
    node = walker.current(mask.node, mask.user, [])
    source = walker.operands(node, mask.layout, mask.user)[-1]
    value = mask.value
    for factor in source.factors:
        value = None if value is None or factor.number is None else value * factor.number
    total = read_operation(source.node)
    is_changed = walker.is_changed(source.node, source.node, mask.user)
    if mask.keep is not None or is_changed or not isinstance(total, Sum) or not are_tensors(total.left, total.right):
        return [replace(mask, node=source.node, layout=source.layout, value=value)], list(source.passed)
    masks, passed = [], [*source.passed, source.node]
    for term, sign in ((total.left, 1), (total.right, total.sign)):
        layout = operand_layout(source.node, source.layout, term)
        signed = None if value is None else sign * value
        inner, between = separated(walker, ScoreMask(term, source.node, layout, None, signed))
        masks += inner
        passed += between
    return masks, passed


def mask_tensor(mask: ScoreMask, scores: Layout) -> MaskTensor:
    """A mask with the axes of its dimensions as those of scores, whose dimensions are given."""
    known = dict(zip(map(leaves, scores), AXES, strict=True))
    axes = tuple(known.get(leaves(dim), other) for dim, other in zip(mask.layout, OTHER_AXES, strict=False))
    return MaskTensor(mask.node, mask.user, axes, mask.keep, mask.value, mask.least)


def operand_layout(node: Node, layout: Layout, operand: Node) -> Layout:
    """The axes of an operand that broadcasts to a node, whose axes are `layout`.

    Raises:
        Misaligned: They cannot be identified.
    """
    return broadcast(layout, shape_of(node), shape_of(operand))
