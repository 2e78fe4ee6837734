"""Recognises a softmax, also where it is written out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from ..graph.node_values import are_tensors, fake_tensor
from ..graph.operation_names import operation_name
from ..graph.operations import LogSoftmax, Scaled, Softmax, Sum
from ..graph.read_operations import read_operation
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
    if _is_exponential(node):
        return _exponential_of_logarithm(node, walker)
    if isinstance(operation, Scaled) and operation.inverted and are_tensors(*node.args[:2]):
        return _quotient(node, operation, walker)
    return None


def _is_exponential(node: Node) -> bool:
    return operation_name(node) in ("exp", "exp_") and are_tensors(*node.args[:1]) and len(node.all_input_nodes) == 1


def _exponential_of_logarithm(node: Node, walker: Walker) -> FoundSoftmax | None:
    """exp(log_softmax(x)), or exp(x - logsumexp(x))."""
    logarithm = walker.value(node.all_input_nodes[0], node)
    operation = read_operation(logarithm)
    if isinstance(operation, LogSoftmax):
        return FoundSoftmax(operation.source, logarithm, operation.dim, (node, logarithm))
    if not isinstance(operation, Sum) or operation.sign != -1 or not are_tensors(operation.left, operation.right):
        return None
    total = find_reduction(walker.value(operation.right, logarithm), "logsumexp")
    scores = walker.value(operation.left, logarithm)
    if total is None or walker.value(total.source, total.nodes[-1]) is not scores:
        return None
    return FoundSoftmax(operation.left, logarithm, total.dim, (node, logarithm, *total.nodes))


def _quotient(node: Node, operation: Scaled, walker: Walker) -> FoundSoftmax | None:
    """exp(x) / sum(exp(x))."""
    dividend, total = (walker.value(item, node) for item in (operation.source, operation.factor))
    summed = find_reduction(total, "sum")
    if summed is None or not _is_exponential(dividend):
        return None
    term = walker.value(summed.source, summed.nodes[-1])
    if term is not dividend and not (_is_exponential(term) and _argument(term, walker) is _argument(dividend, walker)):
        return None
    nodes = dict.fromkeys((node, *summed.nodes, dividend, term))
    return FoundSoftmax(dividend.all_input_nodes[0], dividend, summed.dim, tuple(nodes))


def _argument(exponential: Node, walker: Walker) -> Node:
    return walker.value(exponential.all_input_nodes[0], exponential)


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
    if tensor is None or not tensor.dim() or not isinstance(dim, int) or keepdim is not True:
        return None
    return Reduction(source, dim % tensor.dim(), nodes)


def _arguments(node: Node) -> tuple[Any, Any, Any]:
    names = ("input", "dim", "keepdim")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    dim = given.get("dim")
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    return given.get("input"), dim, given.get("keepdim", False)
