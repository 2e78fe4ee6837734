"""Whole numbers that are those of an arithmetic without overflow, as far as is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from ..graph.node_values import fake_tensor
from .expressions import INTEGERS, Shape
from .handler_tools import dtype_of, need
from .reader import Reader

_LONGEST = 2**24
"""The longest attention for which reading is right: positions may be added, multiplied and scaled in 64 bits."""


def whole(node: Node, expression: sympy.Expr) -> sympy.Expr:
    """The result of arithmetic on integers.

    Where unknown ones of 64 bits overflow, sums and multiples of them are as equal as without; nothing else is read
    from these.
    """
    expression, dtype = sympy.expand(expression), dtype_of(node)
    need(dtype in INTEGERS and fits(expression, dtype))
    return expression


def fits(expression: sympy.Expr, dtype: torch.dtype | None) -> bool:
    """Whether whole numbers of a dtype hold an expression of indices and sizes up to `_LONGEST`.

    Of unknown numbers, those of 32 bits may be more, and those of 64 bits are left to what reads them.
    """
    if dtype == torch.int32 and expression.atoms(AppliedUndef):
        return False
    most = 0
    for term, factor in expression.as_coefficients_dict().items():
        degree = 0 if term.is_number else sum(term.as_powers_dict().values())
        if not sympy.sympify(degree).is_Integer:
            return False
        most += abs(factor) * _LONGEST**degree
    return bool(most < (2**31 if dtype == torch.int32 else 2**62))


def cannot_overflow(expression: sympy.Expr) -> bool:
    """Whether no sum or multiple of unknown numbers is in an expression."""
    return isinstance(expression, (AppliedUndef, sympy.floor, sympy.Mod)) or not expression.atoms(AppliedUndef)


def exact(reader: Reader, value: Any, shape: Shape) -> sympy.Expr:
    """An operand as whole numbers that are those of an arithmetic without overflow."""
    expression = reader.integers(value, shape)
    need(cannot_overflow(expression))
    return expression


def compared(
    reader: Reader, shape: Shape, input: Any, other: Any, read: Callable[[Reader, Any, Shape], sympy.Expr]
) -> tuple[sympy.Expr, sympy.Expr]:
    """Both operands of a comparison of whole numbers, which both fit the dtype that they are compared in."""
    tensors = [tensor for tensor in map(fake_tensor, (input, other)) if tensor is not None]
    wide = any(tensor.dtype == torch.int64 for tensor in [t for t in tensors if t.dim()] or tensors)
    sides = read(reader, input, shape), read(reader, other, shape)
    dtype = torch.int64 if wide else torch.int32
    need(all(dtype_of(value) == dtype or fits(side, dtype) for value, side in zip((input, other), sides, strict=True)))
    return sides
