"""Reads the mask that the blocks of a flex_attention call are made from.

flex_attention computes the blocks of scores that its block mask lists, and applies the mask_mod only to those listed
as partial. So the mask_mod alone says which keys a query sees only if the blocks were made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from ..graph.axes import is_size
from ..graph.node_values import fake_tensor, is_nonnegative, symbolic
from ..graph.operation_names import operation_name
from ..mask.expressions import INTEGERS
from ..mask.reader import Reader


@dataclass(frozen=True)
class BlockMask:
    """The block mask of a call, as the higher-order operator takes it.

    Attributes:
        partial: How many blocks of keys each block of queries has for the mask_mod to refine, and which.
        full: How many it has that are shown whole, and which; None for none.
        block_size: The queries and keys of a block.
        mask_mod: The node of the mask_mod's graph.
    """

    partial: tuple[Node, Node]
    full: tuple[Node | None, Node | None]
    block_size: tuple[Any, Any]
    mask_mod: Node

    @classmethod
    def of(cls, fields: Sequence[Any]) -> BlockMask:
        """The block mask in the order of ``BlockMask.as_tuple``."""
        _, _, counts, indices, full_counts, full_indices, *_, queries, keys, mask_mod = fields
        return cls((counts, indices), (full_counts, full_indices), (queries, keys), mask_mod)

    @property
    def nodes(self) -> list[Node]:
        """The nodes of its tensors."""
        return [node for node in (*self.partial, *self.full) if isinstance(node, Node)]

    def leaves_all_to_mask_mod(self, reader: Reader, lengths: Sequence[int | torch.SymInt]) -> bool:
        """Whether one partial block holds all queries and keys, as where a call has no block mask."""
        counts, indices = self.partial
        return (
            self.full == (None, None)
            and (reader.number(counts), reader.number(indices)) == (1, 0)
            and all(
                isinstance(size, int) and is_nonnegative(size - length)
                for size, length in zip(self.block_size, lengths, strict=True)
            )
        )

    def mask(self, shape: Sequence[int | torch.SymInt]) -> Node | None:
        """The boolean mask that ``create_block_mask`` made the blocks from, if it fits scores of `shape`."""
        queries, keys = map(symbolic, self.block_size)
        if queries is None or keys is None:
            return None
        partial, full = _ordered(*self.partial), _ordered(*self.full)
        counts = _compared(full, "eq", queries * keys)
        if counts is None or not _is_between(partial, counts, queries * keys):
            return None
        mask = _counted(counts, (queries, keys))
        tensor = fake_tensor(mask)
        if tensor is None or not all(map(is_size, tensor.shape[2:], shape[2:])):
            return None
        fits = all(is_size(size, 1) or is_size(size, wide) for size, wide in zip(tensor.shape, shape, strict=True))
        return mask if fits else None


def _operand(node: Any, name: str, *arguments: Any, **options: Any) -> Node | None:
    """The first operand of an operation with these other arguments, if a node is one."""
    if not isinstance(node, Node) or operation_name(node) != name or not node.args:
        return None
    source: Any = node.args[0]
    return source if node.args[1:] == arguments and node.kwargs == options else None


def _uncast(node: Any) -> Node | None:
    """The booleans or whole numbers that a node is a cast of, or itself."""
    while isinstance(node, Node) and operation_name(node) == "to":
        source, tensor = fake_tensor(node.args[0]), fake_tensor(node)
        if source is None or tensor is None or (source.dtype != torch.bool and tensor.dtype not in INTEGERS):
            return None
        node = node.args[0]
    return node


def _ordered(counts: Node | None, indices: Node | None) -> Node | None:
    """The booleans of which the true ones in each row are counted, and their columns listed first."""
    dense = _operand(_uncast(counts), "sum", dim=-1)
    sorted_ = _operand(_uncast(indices), "argsort", dim=-1, descending=True, stable=True)
    found = _uncast(dense)
    tensor = fake_tensor(found)
    return found if dense is sorted_ and tensor is not None and tensor.dtype == torch.bool else None


def _compared(node: Any, name: str, number: sympy.Expr) -> Node | None:
    """The tensor that a node compares with a number, if it does."""
    if not isinstance(node, Node) or operation_name(node) != name or len(node.args) != 2:
        return None
    if symbolic(node.args[1]) != number:
        return None
    source: Any = node.args[0]
    return source


def _is_between(node: Node | None, counts: Node, most: sympy.Expr) -> bool:
    """Whether a node says where counts are neither 0 nor the most they can be."""
    if node is None or operation_name(node) != "and_" or len(node.args) != 2:
        return False
    left, right = node.args
    return _compared(left, "gt", sympy.Integer(0)) is counts and _compared(right, "lt", most) is counts


def _counted(counts: Node, block_size: tuple[sympy.Expr, sympy.Expr]) -> Node | None:
    """The mask whose true elements are counted for each block."""
    blocks = _operand(_operand(counts, "sum", dim=[-2, -1]), "permute", 0, 1, 2, 4, 3, 5)
    if blocks is None or operation_name(blocks) != "view":
        return None
    padded: Any = blocks.args[0]
    tensor, viewed = fake_tensor(padded), fake_tensor(blocks)
    if tensor is None or viewed is None or tensor.dim() != 4 or viewed.dim() != 6:
        return None
    batch, heads, rows, queries, columns, keys = viewed.shape
    shape = (batch, heads, rows * queries, columns * keys)
    if (symbolic(queries), symbolic(keys)) != block_size or not all(map(is_size, tensor.shape, shape)):
        return None
    return _unpadded(padded)


def _unpadded(node: Node) -> Node | None:
    """The mask that a node pads with false at the end of both lengths, if it does."""
    if operation_name(node) != "pad" or len(node.args) != 4 or node.args[2:] != ("constant", None):
        return None
    source: Any = node.args[0]
    amounts: Any = node.args[1]
    at_the_end = len(amounts) == 4 and amounts[0] == 0 and amounts[2] == 0
    return source if at_the_end and all(map(is_nonnegative, amounts)) else None
