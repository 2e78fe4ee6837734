"""Computes with the numbers that tensors of a graph hold, as torch does: in their dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from ..graph.node_values import fake_tensor
from .expressions import Unreadable

Number = int | float


def as_number(value: sympy.Expr) -> Number:
    """A sympy number as one of Python."""
    return int(value) if value.is_Integer else float(value)


def held(value: Number, dtype: torch.dtype) -> Number:
    """A number as a tensor of `dtype` stores it.

    Raises:
        Unreadable: `dtype` is complex, or of whole numbers and cannot hold this one.
    """
    exact = torch.float64 if isinstance(value, float) else torch.int64
    stored = _item(lambda: torch.tensor(value, dtype=exact, device="cpu").to(dtype))
    if not dtype.is_floating_point and dtype != torch.bool and stored != value:
        raise Unreadable
    return stored


def computed(form: Callable[..., torch.Tensor], *operands: tuple[sympy.Expr, Any]) -> Number:
    """The result of an operation on numbers, each with the operand of the graph that it is read from.

    Raises:
        Unreadable: It gives no real number, or torch does not have it for these dtypes.
    """
    return _item(lambda: form(*(_operand(as_number(value), operand) for value, operand in operands)))


def _operand(value: Number, operand: Any) -> Any:
    """A number as a tensor of one element that is promoted as the operand is; a number of the graph as it is."""
    tensor = fake_tensor(operand)
    if tensor is None:
        return operand if isinstance(operand, (int, float)) else value
    return torch.full((1,) * min(tensor.dim(), 1), value, dtype=tensor.dtype, device="cpu")


def _item(make: Callable[[], torch.Tensor]) -> Number:
    try:
        item = make().item()
    except (RuntimeError, OverflowError, TypeError):
        raise Unreadable from None
    if isinstance(item, complex):
        raise Unreadable
    return item
