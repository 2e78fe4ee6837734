"""Recognises a softmax, also where it is written out as exp(x) / sum(exp(x))."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from .operations import Scaled, Softmax, operation_name, read_operation
from .values import are_tensors, fake_tensor
from .walk import Walker


@dataclass(frozen=True)
class FoundSoftmax:
    """A softmax of `source`, as `reader` reads it, over `dim`; `nodes` are those that compute it."""

    source: Node
    reader: Node
    dim: int
    nodes: tuple[Node, ...]


def find_softmax(node: Node, walker: Walker) -> FoundSoftmax | None:
    """The softmax whose result a node is, if it is one.

    Raises:
        Changed: A part of it is changed in place in a way that cannot be followed.
    """
    operation = read_operation(node)
    if isinstance(operation, Softmax):
        return FoundSoftmax(operation.source, node, operation.dim, (node,))
    if not isinstance(operation, Scaled) or not operation.inverted or not are_tensors(*node.args[:2]):
        return None
    dividend, total = (walker.value(item, node) for item in (operation.source, operation.factor))
    summed = find_reduction(total, "sum")
    if summed is None or operation_name(dividend) not in ("exp", "exp_"):
        return None
    if walker.value(summed.source, summed.nodes[-1]) is not dividend or not are_tensors(*dividend.args[:1]):
        return None
    return FoundSoftmax(dividend.all_input_nodes[0], dividend, summed.dim, (node, *summed.nodes, dividend))


@dataclass(frozen=True)
class Reduction:
    """A reduction of `source` that keeps the dimension `dim`; the last of `nodes` reads the source."""

    source: Node
    dim: int
    nodes: tuple[Node, ...]


def find_reduction(node: Node, *names: str) -> Reduction | None:
    """The reduction that a node is, if it is one of these names."""
    nodes: tuple[Any, ...] = (node,)
    if operation_name(node) in ("getitem", "getattr") and node.args[1] in (0, "values"):
        # Only the maximum along a dimension is a pair, of values and indices.
        nodes = (node, node.args[0])
    reduced = nodes[-1]
    is_pair = operation_name(reduced) == "max"
    if operation_name(reduced) not in names or is_pair != (len(nodes) == 2):
        return None
    source, dim, keepdim = _arguments(reduced)
    tensor = fake_tensor(source)
    if tensor is None or not isinstance(dim, int) or keepdim is not True:
        return None
    return Reduction(source, dim % tensor.dim(), nodes)


def _arguments(node: Node) -> tuple[Any, Any, Any]:
    names = ("input", "dim", "keepdim")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    dim = given.get("dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return given.get("input"), dim, given.get("keepdim", False)
