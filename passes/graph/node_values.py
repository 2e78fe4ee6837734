"""The value of a node as known while compiling: its fake tensor, or its number.

Nothing else reads what Dynamo noted at nodes: its fake tensors are those of the end of the graph (`metadata`), and some
are of kinds that the passes leave alone.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Node

from .torch_internals import guard_or_false, is_plain, is_true_now, tree_leaves, truth, unbatched, why_not_plain

AS_COMPUTED = "s2o_as_computed"
"""The key of a node's `meta` under which `metadata` puts its tensor where Dynamo's is that of a later node."""


def held(node: Node) -> Any:
    """The value of a node when it was computed: a tensor, a number or a structure of them; None where it is unknown."""
    return node.meta.get(AS_COMPUTED, node.meta.get("example_value"))


def fake_tensor(node: Any) -> torch.Tensor | None:
    """The tensor that stands for a node, as it was when the node was computed.

    None where the node is none or holds none, where its tensor was changed later and is not known any more, and where
    the tensor is of another kind than a dense one: sparse, nested, of a subclass or differentiated by torch.func.
    """
    value = held(node) if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) and is_plain(value) else None


def objects(node: Node) -> list[torch.Tensor]:
    """The tensors of all kinds that a node holds, also in tuples, as they are at the end of the graph.

    They identify nodes that hold the same tensor or share memory; use `fake_tensor` for everything else.
    """
    return [leaf for leaf in tree_leaves(node.meta.get("example_value")) if isinstance(leaf, torch.Tensor)]


def why_unknown(node: Node) -> str | None:
    """Why there is no `fake_tensor` of a node that holds a tensor, as the end of a sentence; None if it holds none."""
    tensors = objects(node)
    return why_not_plain(tensors[0]) if tensors else None


def is_floating(node: Any) -> bool:
    """Whether a node holds a tensor of floating point."""
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_floating_point()


def needs_gradients(node: Node) -> bool:
    """Whether a node holds a tensor that needs gradients, also inside vmap."""
    tensor = fake_tensor(node)
    return tensor is not None and unbatched(tensor).requires_grad


def are_tensors(*values: Any) -> bool:
    """Whether all values are nodes that hold tensors."""
    return all(fake_tensor(value) is not None for value in values)


def symbolic(value: Any) -> sympy.Expr | None:
    """A size, an index or a node that holds one, as a sympy expression; None for anything else."""
    if isinstance(value, Node):
        value = held(value)
    if isinstance(value, torch.SymInt):
        return sympy.sympify(value.node.expr)
    if isinstance(value, int) and not isinstance(value, bool):
        return sympy.Integer(value)
    return None


def is_nonnegative(value: Any) -> bool:
    """Whether a size, an index or a node that holds one is at least zero; the graph is guarded by the answer."""
    if isinstance(value, Node):
        value = held(value)
    return isinstance(value, (int, torch.SymInt)) and guard_or_false(value >= 0)


def holds(expression: sympy.Expr, tensor: torch.Tensor) -> bool:
    """Whether an expression of sizes is at least zero; the graph of the fake `tensor` is guarded by the answer."""
    return _is_nonnegative(expression, tensor, guard_or_false)


def may_hold(expression: sympy.Expr, tensor: torch.Tensor) -> bool:
    """Whether `holds` would say so; the graph is not guarded."""
    return _is_nonnegative(expression, tensor, is_true_now)


def _is_nonnegative(expression: sympy.Expr, tensor: torch.Tensor, ask: Callable[[torch.SymBool], bool]) -> bool:
    if expression.is_nonnegative is not None:
        return bool(expression.is_nonnegative)
    answer = truth(sympy.Ge(expression, 0), tensor)
    return answer is not None and ask(answer)


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
    known = held(value)
    if isinstance(known, (torch.SymInt, torch.SymFloat)):
        expression = known.node.expr
        known = expression if not expression.free_symbols else None
    return float(known) if isinstance(known, (numbers.Real, sympy.Number)) else value


def number(value: Any) -> float | Node | None:
    """A number that is known, or a node that holds one while the graph runs; None for anything else."""
    value = constant(value)
    if isinstance(value, Node):
        return value if isinstance(held(value), (torch.SymInt, torch.SymFloat)) else None
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
