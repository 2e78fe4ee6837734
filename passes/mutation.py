"""Which tensors of a graph are written to in place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from .torch_internals import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    StorageWeakRef,
    flex_attention,
    is_wrapper,
    tree_leaves,
    unbatched,
    written_arguments,
)
from .values import fake_tensor

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


class Writes:
    """The nodes that write to each storage; a view shares the storage of its base."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._writers: dict[StorageWeakRef, list[Node]] = {}
        self._holders: dict[StorageWeakRef, list[Node]] = {}
        self.add(nodes)

    def add(self, nodes: Iterable[Node]) -> None:
        """Note nodes, in the order of their graph, that write to none of the storages that are known so far."""
        for node in nodes:
            held = fake_tensor(node)
            if held is not None:
                self._holders.setdefault(_storage(held), []).append(node)
            tensors = map(fake_tensor, tree_leaves(list(_written(node))))
            for written in {_storage(tensor) for tensor in tensors if tensor is not None}:
                self._writers.setdefault(written, []).append(node)

    def to(self, node: Node) -> list[Node]:
        """The nodes that write to the memory of a node's tensor, in order."""
        tensor = fake_tensor(node)
        return [] if tensor is None else self._writers.get(_storage(tensor), [])

    def readers(self, node: Node) -> set[Node]:
        """What may read what a node writes in place, its own users included; inputs are read by their owners."""
        tensor = fake_tensor(node)
        if tensor is None or node not in self.to(node):
            return set(node.users)
        holders = self._holders[_storage(tensor)]
        users = {user for holder in holders for user in holder.users if node < user}
        return users | {holder for holder in holders if holder.op in ("placeholder", "get_attr")}


def _storage(tensor: torch.Tensor) -> StorageWeakRef:
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
    overload = getattr(target, "default", target) if isinstance(target, OpOverloadPacket) else target
    if isinstance(overload, OpOverload):
        yield from _written_by_schema(node, overload)
    elif target is flex_attention:
        return
    elif isinstance(target, HigherOrderOperator) or not _is_of_torch(target):
        yield from node.all_input_nodes
    elif target in _WRITTEN:
        yield from _arguments(node, target, _WRITTEN[target])
    elif target in _IN_PLACE_OPERATORS or _in_place_name(getattr(target, "__name__", "")) or _asks(node, target):
        yield from node.args[:1]
        yield node.kwargs.get("input")


def _written_by_schema(node: Node, overload: OpOverload) -> Iterator[Any]:
    for place, name in written_arguments(overload):
        yield node.args[place] if place < len(node.args) else node.kwargs.get(name)


def _in_place_name(name: str) -> bool:
    magic = name.startswith("__") and name.endswith("__")
    return name in _IN_PLACE_MAGIC or (name.endswith("_") and not magic and name not in _PURE)


def _is_of_torch(target: Any) -> bool:
    """Whether a function is one of PyTorch's or Python's own, not one that wraps something unknown, as of NumPy."""
    module = getattr(target, "__module__", None) or "torch"
    return not is_wrapper(target) and module.split(".")[0] in ("torch", "_operator", "builtins", "math")


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
