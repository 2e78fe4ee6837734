"""What Dynamo knows about a node's value: its fake tensor, or its number."""

from __future__ import annotations

import numbers
from typing import Any

import sympy
import torch
from torch.fx import Node

from .torch_internals import guard_or_false, is_true_now, truth


def fake_tensor(node: Any) -> torch.Tensor | None:
    """The tensor that stands for a node while it is traced; None where the node is none or holds none."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def are_tensors(*values: Any) -> bool:
    """Whether all values are nodes that hold tensors."""
    return all(fake_tensor(value) is not None for value in values)


def symbolic(value: Any) -> sympy.Expr | None:
    """A size, an index or a node that holds one, as a sympy expression; None for anything else."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return sympy.sympify(value.node.expr)
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    return None


def is_nonnegative(value: Any) -> bool:
    """Whether a size, an index or a node that holds one is at least zero; the graph is guarded by the answer."""
    if isinstance(value, Node):
        value = value.meta.get("example_value")
    return isinstance(value, (int, torch.SymInt)) and guard_or_false(value >= 0)


def holds(expression: sympy.Expr, tensor: torch.Tensor) -> bool:
    """Whether an expression of sizes is at least zero; the graph of the fake `tensor` is guarded by the answer."""
    if expression.is_nonnegative is not None:
        return bool(expression.is_nonnegative)
    answer = truth(sympy.Ge(expression, 0), tensor)
    return answer is not None and guard_or_false(answer)


def may_hold(expression: sympy.Expr, tensor: torch.Tensor) -> bool:
    """Whether `holds` would say so; the graph is not guarded."""
    if expression.is_nonnegative is not None:
        return bool(expression.is_nonnegative)
    answer = truth(sympy.Ge(expression, 0), tensor)
    return answer is not None and is_true_now(answer)


def symbolic_size(size: int | torch.SymInt) -> sympy.Expr:
    """A size as a sympy expression."""
    return sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)


def symbolic_shape(tensor: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The sizes of a tensor as sympy expressions."""
    return tuple(map(symbolic_size, tensor.shape))


def constant(value: Any) -> Any:
    """`value`, or the number a node is known to hold; the node itself where its number is not known."""
    if not isinstance(value, Node):
        return value
    held = value.meta.get("example_value")
    if isinstance(held, (torch.SymInt, torch.SymFloat)):
        expression = held.node.expr
        held = expression if not expression.free_symbols else None
    return float(held) if isinstance(held, (numbers.Real, sympy.Number)) else value


def number(value: Any) -> float | Node | None:
    """A number that is known, or a node that holds one while the graph runs; None for anything else."""
    value = constant(value)
    if isinstance(value, Node):
        held = value.meta.get("example_value")
        return value if isinstance(held, (torch.SymInt, torch.SymFloat)) else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
