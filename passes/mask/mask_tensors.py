"""Reads a mask of an attention as a predicate that holds where a query may see a key."""

from __future__ import annotations

import math
from dataclasses import dataclass

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ...ops.validation import dtype_name
from ..graph.mutation import Writes
from ..graph.node_values import fake_tensor, why_unknown
from .empty_rows import Hiding
from .expressions import OTHER_AXES, Unreadable, as_choice, axis, level, where
from .reader import Reader
from .refused import Refused

_MAPPED_AXES = tuple(map(level, range(1, 9)))
HIDDEN = -9984.0
"""Added to scores, or put in their place, numbers from here down hide a key; it is what bfloat16 makes of -1e4."""


@dataclass(frozen=True)
class MaskTensor:
    """One of the masks of an attention.

    Attributes:
        node: A boolean mask, or one that is added to the scores.
        user: The node that reads it.
        axes: The index along each of its dimensions: one of `AXES`, or of `OTHER_AXES` where it is none of these.
        keep: Whether keys are hidden where a boolean mask is false, or where it is true; None if it is added.
        value: What hidden scores become, or what an added mask is multiplied by; None if that is not known.
        least: What lesser scores are raised to afterwards.
    """

    node: Node
    user: Node
    axes: tuple[sympy.Symbol, ...]
    keep: bool | None
    value: float | None
    least: float = -math.inf


class MaskReader:
    """Reads the mask tensors of one graph.

    Args:
        reader: Reads any tensor of the graph.
        writes: What is written to its tensors.
    """

    def __init__(self, reader: Reader, writes: Writes) -> None:
        self._reader, self._writes = reader, writes
        self._careful = reader.without(lambda node: bool(writes.to(node)))

    def allowed(self, mask: MaskTensor) -> tuple[Boolean, Hiding]:
        """Where a mask lets a query see a key, as a predicate over `AXES`, and what hides it elsewhere.

        Raises:
            Refused: The mask cannot be read, hides no key, or depends on something else than `AXES`.
        """
        tensor = fake_tensor(mask.node)
        if tensor is None:
            kind = why_unknown(mask.node)
            raise Refused(f"the mask is {kind}" if kind else "the shape of the mask is not known while compiling")
        if mask.keep is not None and tensor.dtype != torch.bool:
            raise Refused(f"the mask is {dtype_name(tensor.dtype)}, not boolean; use a boolean mask to fill scores")
        predicate, hidden = _visible(mask, self._expression(mask, tensor))
        if mask.least > HIDDEN:
            raise Refused(f"masked scores become {_number(mask.least)}, which hides no key; fill them with -inf")
        scores = fake_tensor(mask.user) if mask.keep is None else None
        return _over_axes(predicate, mask, tensor.dim()), Hiding.of(hidden, scores, mask.least)

    def _expression(self, mask: MaskTensor, tensor: torch.Tensor) -> sympy.Basic:
        """The content of a mask when it is used."""
        expression = _read(self._reader, mask.node)
        if not self._is_changed(mask):
            return expression
        writers = self._writes.to(mask.node)
        if writers and (tensor.dtype != torch.bool or any(mask.user < writer for writer in writers)):
            if mask.keep is None and not writers[0] < mask.user:
                _where_nothing_is_added(mask, expression)
            raise Refused(f"the mask {node_in_words(mask.node)} is changed in place; build it without that")
        return _read(self._careful, mask.node)

    def _is_changed(self, mask: MaskTensor) -> bool:
        """Whether something that a mask is read from is written to before it is read."""
        sources = self._reader.sources(mask.node)
        for node in sources:
            writers = self._writes.to(node)
            readers = [user for user in node.users if user in sources] + [mask.user] * (node is mask.node)
            is_leaf = node not in self._reader.understood
            if any(is_leaf or node < writer < reader for writer in writers for reader in readers):
                return True
        return False


def _visible(mask: MaskTensor, expression: sympy.Basic) -> tuple[Boolean, float]:
    """Where a mask hides nothing, over its own indices, and the number that hides keys elsewhere."""
    if mask.keep is None:
        return _where_nothing_is_added(mask, expression)
    if mask.value is None or not mask.value <= HIDDEN:
        raise Refused(f"masked scores become {_number(mask.value)}, which hides no key; fill them with -inf")
    return expression if mask.keep else sympy.Not(expression), mask.value


def _over_axes(predicate: Boolean, mask: MaskTensor, rank: int) -> Boolean:
    """A predicate over the indices of a mask as one over `AXES`."""
    predicate = predicate.xreplace({axis(rank - place): symbol for place, symbol in enumerate(mask.axes)})
    if predicate.free_symbols & {*_MAPPED_AXES}:
        raise Refused(f"the mask {node_in_words(mask.node)} is another for each of what torch.vmap maps over")
    if predicate.free_symbols & {*OTHER_AXES}:
        raise Refused(f"the mask {node_in_words(mask.node)} varies over another dimension than batch, heads and keys")
    return predicate


def _read(reader: Reader, node: Node) -> sympy.Basic:
    """The content of a mask."""
    try:
        return reader.read(node).expression
    except Unreadable as unreadable:
        raise Refused(f"the mask cannot be read: {unreadable}") from None


def _where_nothing_is_added(mask: MaskTensor, expression: sympy.Basic) -> tuple[Boolean, float]:
    """Where an added mask is zero, if it hides keys everywhere else, and what it adds there."""
    content = Refused(
        f"scores get an additive bias with content, {node_in_words(mask.node)}, such as ALiBi or relative positions; "
        "only masks that add 0, or -inf to hide a key, can be proven; compute it from a boolean"
    )
    choice = as_choice(expression)
    if choice is None or mask.value is None:
        raise content
    added = [float(value) * mask.value for value in choice.values]
    if not all(value == 0 or value <= HIDDEN for value in added):
        raise content
    hidden = max((value for value in added if value != 0), default=-math.inf)
    return where(choice, lambda value: value == 0), hidden


def _number(value: float | None) -> str:
    return "a value that is not known or changed in place" if value is None else f"{value:g}"


def node_in_words(node: Node) -> str:
    """A node in words: an input of the graph, or the operation that computes it."""
    if node.op == "placeholder":
        return f"input {node.name.strip('_').removeprefix('l_').removeprefix('kwargs_')}"
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"the result of {operation}"
