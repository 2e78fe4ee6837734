"""The inputs of the operator: which of the nodes that an operand is made from to take, and how to lay it out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.axes import Axis, Layout, Misaligned, Step, all_leaves, leaves, relayout
from ..graph.node_values import fake_tensor
from ..graph.torch_internals import unbatched
from .walk import Operand


@dataclass(frozen=True)
class Input:
    """A query, key or value: a node, and the tensor methods that make it [batch, heads, length, channels].

    Attributes:
        shape: The shape that results.
    """

    node: Node
    steps: tuple[Step, ...] = ()
    shape: tuple[Any, ...] | None = None

    @property
    def tensor(self) -> torch.Tensor | None:
        """A fake tensor of the resulting shape; None where the node's is not known."""
        tensor = fake_tensor(self.node)
        return tensor if tensor is None or self.shape is None else unbatched(tensor).new_empty(self.shape)


def fewest_axes(operands: Sequence[Operand]) -> set[Axis]:
    """The axes of an operand before it was broadcast."""
    return set(all_leaves(operands[-1].layout))


def choose(operands: Sequence[Operand], layout: Layout) -> Operand:
    """The operand that takes least to lay out, of the narrowest dtype.

    Raises:
        Misaligned: None has the axes of `layout`, or it takes a size that is only known at run time.
    """
    best: tuple[tuple[int, int], Operand] | None = None
    for operand in operands[::-1]:
        try:
            cost = operand.tensor.dtype.itemsize, len(relayout(operand.layout, layout))
        except Misaligned:
            continue
        if best is None or cost < best[0]:
            best = cost, operand
    if best is None:
        raise Misaligned
    return best[1]


def laid_out(operand: Operand, layout: Layout, dtype: torch.dtype | None = None) -> Input:
    """An operand as an input of the operator in `layout`, cast to `dtype` if one is given."""
    sizes = tuple(math.prod(axis.size for axis in leaves(dim)) for dim in layout)
    return Input(operand.node, (*relayout(operand.layout, layout), *cast(operand.tensor, dtype)), sizes)


def cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> tuple[Step, ...]:
    """The tensor methods that cast to `dtype`, if one is given and it is another."""
    return () if dtype in (None, tensor.dtype) else (("to", (dtype,)),)
