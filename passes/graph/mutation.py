"""Which tensors of a graph are written to in place."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.fx import Node

from .node_values import objects
from .torch_internals import (
    HigherOrderOperator,
    OpOverload,
    OpOverloadPacket,
    StorageWeakRef,
    flex_attention,
    is_inplace_view,
    is_wrapper,
    storages,
    tree_leaves,
    written_arguments,
)

_Storage = StorageWeakRef | None

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
"""The arguments that functions write to, where it is not the first."""
_PURE = {"and_", "or_", "not_", "is_"}


class Writes:
    """The nodes that write to each storage; a view shares the storage of its base.

    Where a tensor's memory is not known it may be any, as that of a tensor which `set_` gives other memory.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._writers: dict[_Storage, list[Node]] = {}
        self._holders: dict[_Storage, list[Node]] = {}
        self._moved: set[int] = set()
        self._memory: dict[Node, set[_Storage]] = {}
        self.add(nodes)

    def add(self, nodes: Iterable[Node]) -> None:
        """Note nodes, in the order of their graph, that write to none of the storages that are known so far."""
        nodes = list(nodes)
        self._moved |= {id(tensor) for node in nodes if _moves(node) for tensor in objects(node.all_input_nodes[0])}
        for node in nodes:
            for storage in self._storages(node):
                self._holders.setdefault(storage, []).append(node)
            written = [item for item in tree_leaves(list(_written(node))) if isinstance(item, Node)]
            for storage in set().union(*map(self._storages, written)):
                self._writers.setdefault(storage, []).append(node)

    def to(self, node: Node) -> list[Node]:
        """The nodes that write to the memory of a node's tensor, in order."""
        return self._among(self._writers, node)

    def readers(self, node: Node) -> set[Node]:
        """The nodes that may read the memory that a node writes to, its users included; callers read inputs."""
        if node not in self.to(node):
            return set(node.users)
        holders = self._among(self._holders, node)
        users = {user for holder in holders for user in holder.users if node < user}
        return users | {holder for holder in holders if holder.op in ("placeholder", "get_attr")}

    def _among(self, nodes: dict[_Storage, list[Node]], node: Node) -> list[Node]:
        """Those of the nodes by storage that share memory with a node, in order."""
        own = self._storages(node)
        if not own:
            return []
        shared = nodes.keys() if None in own else {*own, None} & nodes.keys()
        if len(shared) == 1:
            return nodes[next(iter(shared))]
        return sorted({other for storage in shared for other in nodes[storage]})

    def _storages(self, node: Node) -> set[_Storage]:
        """Identities of the memory of the tensors that a node holds."""
        if node not in self._memory:
            tensors = objects(node)
            is_known = self._moved.isdisjoint(map(id, tensors))
            self._memory[node] = set().union(*map(storages, tensors), () if is_known else {None})
        return self._memory[node]


def changes_shape(node: Node) -> bool:
    """Whether a node changes in place the shape of its tensor, its memory or its place in the graph of gradients."""
    return is_inplace_view(called_name(node)) and (node.op == "call_method" or not _is_unknown(node.target))


def may_change_anything(node: Node) -> bool:
    """Whether a node calls what is not known, which may change the shape of its inputs, or writes to an output."""
    return "out" in node.kwargs or (node.op == "call_function" and _is_unknown(node.target))


def _is_unknown(target: Any) -> bool:
    """Whether a function is none that PyTorch knows what it changes of."""
    return not isinstance(target, (OpOverload, OpOverloadPacket, HigherOrderOperator)) and not _is_of_torch(target)


def _moves(node: Node) -> bool:
    """Whether a node gives its tensor other memory."""
    return called_name(node) == "set_"


def called_name(node: Node) -> str:
    """The name of what a node calls, of whatever library."""
    target = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    if node.op == "call_function":
        return getattr(target, "__name__", "")
    return str(target) if node.op == "call_method" else ""


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
