"""Which tensors of a graph are written to in place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.multiprocessing.reductions import StorageWeakRef

from .values import fake_tensor, unbatched

_IN_PLACE_OPERATORS = {
    operator.setitem, operator.iadd, operator.isub, operator.imul, operator.imatmul, operator.itruediv,
    operator.ifloordiv, operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor,
    operator.ilshift, operator.irshift,
}  # fmt: skip
_IN_PLACE_MAGIC = {"__setitem__"} | {f"__{function.__name__}__" for function in _IN_PLACE_OPERATORS}
_WRITTEN = {
    torch.nn.functional.batch_norm: ("running_mean", "running_var"),
    torch.nn.functional.instance_norm: ("running_mean", "running_var"),
    torch.nn.functional.embedding: ("weight",),
    torch.nn.functional.embedding_bag: ("weight",),
}
"""What functions write to other than their first argument."""
_PURE = {"and_", "or_", "not_", "is_"}


def writes(graph: Graph) -> dict[StorageWeakRef, list[Node]]:
    """The nodes of a graph that write to a storage, in order; a view shares the storage of its base."""
    found: dict[StorageWeakRef, list[Node]] = {}
    for node in graph.nodes:
        tensors = map(fake_tensor, torch.utils._pytree.tree_leaves(list(_written(node))))
        for written in {storage(tensor) for tensor in tensors if tensor is not None}:
            found.setdefault(written, []).append(node)
    return found


def storage(tensor: torch.Tensor) -> StorageWeakRef:
    """An identity of a tensor's memory."""
    return StorageWeakRef(unbatched(tensor).untyped_storage())


def _written(node: Node) -> Iterator[Any]:
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    if node.op == "call_method" and _in_place_name(str(node.target)):
        yield node.args[0]
    if node.op == "call_function" and callable(node.target):
        yield from _written_by_function(node, node.target)


def _written_by_function(node: Node, target: Any) -> Iterator[Any]:
    overload = getattr(target, "default", target) if isinstance(target, torch._ops.OpOverloadPacket) else target
    if isinstance(overload, torch._ops.OpOverload):
        yield from _written_by_schema(node, overload)
    elif target is torch.ops.higher_order.flex_attention:
        return
    elif isinstance(target, torch._ops.HigherOrderOperator) or not _is_of_torch(target):
        yield from node.all_input_nodes
    elif target in _WRITTEN:
        yield from _arguments(node, target, _WRITTEN[target])
    elif target in _IN_PLACE_OPERATORS or _in_place_name(getattr(target, "__name__", "")) or _asks(node, target):
        yield from node.args[:1]
        yield node.kwargs.get("input")


def _written_by_schema(node: Node, overload: torch._ops.OpOverload) -> Iterator[Any]:
    for place, argument in enumerate(overload._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)


def _in_place_name(name: str) -> bool:
    magic = name.startswith("__") and name.endswith("__")
    return name in _IN_PLACE_MAGIC or (name.endswith("_") and not magic and name not in _PURE)


def _is_of_torch(target: Any) -> bool:
    """Whether a function is one of PyTorch's or Python's own, not one that wraps something unknown, as of NumPy."""
    module = getattr(target, "__module__", None) or "torch"
    return not module.startswith("torch._dynamo") and module.split(".")[0] in ("torch", "_operator", "builtins", "math")


def _arguments(node: Node, target: Any, names: tuple[str, ...]) -> Iterator[Any]:
    given = inspect.signature(target).bind(*node.args, **node.kwargs).arguments
    yield from (given.get(name) for name in names)


def _asks(node: Node, target: Any) -> bool:
    """Whether a Python function is called with ``inplace=True``."""
    if not inspect.isfunction(target):
        return False
    try:
        given = inspect.signature(target).bind(*node.args, **node.kwargs).arguments
    except TypeError:
        return False
    return bool(given.get("inplace"))
