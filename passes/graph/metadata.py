"""Tensors as they were when their nodes were computed.

The fake tensor of a node is an object that Dynamo goes on tracing with. What changes it in place later, as `unsqueeze_`
does, changes it for all nodes that hold it, and at the end of the graph they all have its last shape. That is undone:

- Such changes are made out of place, and what comes later takes their results, so that no tensor of the graph changes
  its shape while the graph runs.
- What shape a tensor had is computed again, and noted where `values.held` finds it. Where that fails, the nodes before
  the last change count as unknown, and the change stays as it is.
- Whether a tensor needed gradients before something was written to it, or before it was detached, follows from what it
  was computed from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .autocast import autocast_at
from .mutation import Writes, called_name, changes_shape, may_change_anything
from .node_values import AS_COMPUTED, fake_tensor, objects, symbolic_size
from .torch_internals import HigherOrderOperator, fake_mode, is_plain, tree_leaves, tree_map, version, without_guards

_OTHER_MEMORY = ("set_", "resize_", "resize_as_")
"""Changes that have no counterpart out of place."""
_RESETS = ("detach_", "set_", "requires_grad_")
"""Operations after which a tensor may need no gradients any more."""


@contextmanager
def as_computed(graph: Graph) -> Iterator[OutOfPlace]:
    """A context in which `fake_tensor` gives the tensors of a graph as they were when their nodes were computed.

    Yields:
        What was changed in the graph for that.
    """
    nodes = list(graph.nodes)
    needs_gradients = _needs_gradients(nodes)
    found = _changed_tensors(nodes)
    _compute_again(nodes, found)
    made = OutOfPlace()
    for changed in found.values():
        changed.settle(made)
    for node, is_needed in needs_gradients.items():
        _note_gradients(node, is_needed)
    try:
        yield made
    finally:
        for node in graph.nodes:
            node.meta.pop(AS_COMPUTED, None)


@dataclass
class OutOfPlace:
    """Changes of shape that were made out of place."""

    _before: list[tuple[Node, Any, Any, Any, Any]] = field(default_factory=list)

    def make(self, change: Node, holders: Sequence[Node]) -> None:
        """Make a change out of place, and let those later users of its tensor's holders use its result."""
        earlier = [holder for holder in holders if holder < change]
        users = {user for holder in earlier for user in holder.users if change < user}
        self._before += [(node, node.op, node.target, node.args, node.kwargs) for node in (change, *users)]
        change.op, change.target = "call_method", called_name(change).removesuffix("_")
        for user in users:
            for holder in earlier:
                user.replace_input_with(holder, change)

    def undo(self) -> None:
        """Make the graph what it was."""
        for node, op, target, args, kwargs in reversed(self._before):
            node.op, node.target, node.args, node.kwargs = op, target, args, kwargs


@dataclass
class _Changed:
    """A tensor whose shape is changed in place, or may be.

    Attributes:
        tensor: As it is at the end.
        holders: The nodes that hold it, also in tuples, in order.
        changes: The nodes that change its shape, and others that may, in order.
        replica: What was computed again, as it is so far; None if that failed.
        shapes: Its shape, strides and offset at each holder, as far as they were computed.
    """

    tensor: Tensor
    holders: list[Node] = field(default_factory=list)
    changes: list[Node] = field(default_factory=list)
    replica: Tensor | None = None
    shapes: dict[Node, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def own(self) -> list[Node]:
        """The holders without those of tuples."""
        return [node for node in self.holders if node.meta["example_value"] is self.tensor]

    def settle(self, made: OutOfPlace) -> None:
        """Note what the tensor was at its holders, and make its changes out of place where all of them are known."""
        is_followed = self.replica is not None and _has_same_metadata(self.replica, self.tensor)
        if is_followed and not any(map(changes_shape, self.changes)):
            return
        notes = self._as_computed() if is_followed and self._can_change_out_of_place() else None
        if notes is None:
            for node in self.own:
                if node < self.changes[-1]:
                    node.meta[AS_COMPUTED] = None
            return
        for node, tensor in notes.items():
            node.meta[AS_COMPUTED] = tensor
        for change in self.changes:
            made.make(change, self.own)

    def _as_computed(self) -> dict[Node, Tensor] | None:
        """The tensor as it was at the nodes that hold it, in the same memory; None if it was never there."""
        try:
            with fake_mode([self.tensor]), torch.no_grad():
                return {node: self.tensor.data.as_strided(*self.shapes[node]) for node in self.own}
        except RuntimeError:
            return None

    def _can_change_out_of_place(self) -> bool:
        own = self.own
        users = {user for node in self.holders if node not in own for user in node.users}
        return (
            all(change in own and _has_counterpart(change) for change in self.changes)
            and all(node.op in ("call_function", "call_method") for node in own)
            and not any(self.changes[0] < user for user in users)
        )


def _has_counterpart(change: Node) -> bool:
    """Whether a tensor method does out of place what a node does in place."""
    name = called_name(change)
    return changes_shape(change) and bool(change.args) and name not in _OTHER_MEMORY and hasattr(Tensor, name[:-1])


def _changed_tensors(nodes: Sequence[Node]) -> dict[int, _Changed]:
    """The tensors that are changed, by identity."""
    found: dict[int, _Changed] = {}
    for node in nodes:
        for tensor in (tensor for source in _sources_that_change(node) for tensor in objects(source)):
            if changes_shape(node) or version(tensor) != 0:
                found.setdefault(id(tensor), _Changed(tensor)).changes.append(node)
    for node in nodes if found else ():
        for tensor in objects(node):
            if id(tensor) in found:
                found[id(tensor)].holders.append(node)
    return found


def _sources_that_change(node: Node) -> list[Node]:
    """The inputs of a node whose shape it changes, or may change."""
    if changes_shape(node):
        return node.all_input_nodes[:1]
    if isinstance(node.target, HigherOrderOperator):
        # Dynamo lets no graph change the shape of its inputs.
        return [source for source in node.all_input_nodes if source.op in ("call_function", "call_method")]
    return node.all_input_nodes if may_change_anything(node) else []


def _compute_again(nodes: Sequence[Node], found: dict[int, _Changed]) -> None:
    """Compute the shapes of changed tensors again, in the order of the graph."""
    for node in nodes if found else ():
        held = [found.get(id(tensor)) for tensor in objects(node)]
        new = [changed is not None and changed.holders[0] is node for changed in held]
        if any(new) or (any(held) and changes_shape(node)):
            results = _run(node, found) or [None] * len(held)
            for changed, is_new, result in zip(held, new, results, strict=True):
                if changed is not None and (is_new or changes_shape(node)):
                    changed.replica = result
        for changed in filter(None, held):
            if changed.replica is not None:
                changed.shapes[node] = _geometry(changed.replica)


def _run(node: Node, found: dict[int, _Changed]) -> Sequence[Tensor | None] | None:
    """The fake tensors that a node computes from copies of what its inputs hold; None if that fails."""
    is_known = node.op in ("call_function", "call_method") and not may_change_anything(node)
    is_call = is_known and not isinstance(node.target, HigherOrderOperator) and called_name(node) not in _OTHER_MEMORY
    if not is_call or "unbacked_bindings" in node.meta:
        return None

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        now = found[id(value)].replica if id(value) in found else value
        if now is None or not is_plain(now):
            raise RuntimeError("its shape is not known")
        return now.data

    target: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    if changes_shape(node):  # In place, on a tensor of symbolic sizes, it may end the process.
        target = getattr(Tensor, called_name(node).removesuffix("_"))
    try:
        with fake_mode(objects(node)), torch.no_grad(), autocast_at(node):
            args, kwargs = map_arg((node.args, node.kwargs), lambda item: tree_map(copy, item.meta["example_value"]))
            results = [item for item in tree_leaves(target(*args, **kwargs)) if isinstance(item, Tensor)]
    except Exception:  # of whatever kind: the shape is then not known
        return None
    return results if len(results) == len(objects(node)) else None


def _geometry(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()


def _has_same_metadata(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are known to differ in content and memory only."""
    sizes, others = ((*tensor.size(), *tensor.stride(), tensor.storage_offset()) for tensor in (one, other))
    return (
        (one.dim(), one.dtype, one.device) == (other.dim(), other.dtype, other.device)
        and is_plain(other)
        and list(map(symbolic_size, sizes)) == list(map(symbolic_size, others))
    )


def _needs_gradients(nodes: Sequence[Node]) -> dict[Node, bool]:
    """Whether the tensor of each node needed gradients when it was computed, or may have; empty where that is plain.

    Writing to a tensor makes it need them where what is written does, and detaching it ends that. What it was before
    follows from what it was computed from.
    """
    reset = {id(tensor): node for node in nodes if called_name(node) in _RESETS for tensor in objects(node)}
    computed = (node for node in nodes if node.op in ("call_function", "call_method"))
    if not reset and not any(tensor.requires_grad for node in computed for tensor in objects(node)):
        return {}
    writes = Writes(nodes)
    found: dict[Node, bool] = {}
    for node in nodes:
        tensors = objects(node)
        at_the_end = any(tensor.requires_grad for tensor in tensors)
        is_reset_later = any(node < reset[id(tensor)] for tensor in tensors if id(tensor) in reset)
        is_written_later = at_the_end and any(node < writer for writer in writes.to(node))
        is_known = bool(tensors) and not is_reset_later and not is_written_later
        found[node] = at_the_end if is_known else _inherits(node, found, writes)
    return found


def _inherits(node: Node, found: dict[Node, bool], writes: Writes) -> bool:
    """Whether something that a node is computed from needed gradients by then, or may have."""
    sources = [source for source in node.all_input_nodes if objects(source)]
    if not sources or may_change_anything(node) or isinstance(node.target, HigherOrderOperator):
        return True
    return any(found[item] for source in sources for item in (source, *writes.to(source)) if item < node)


def _note_gradients(node: Node, needed: bool) -> None:
    """Note whether a node's tensor needed gradients, if it says otherwise."""
    tensor = fake_tensor(node)
    if tensor is not None and tensor.is_floating_point() and tensor.requires_grad != needed:
        with torch.no_grad():
            node.meta[AS_COMPUTED] = tensor.data.requires_grad_(needed)


def note_values(nodes: Iterable[Node]) -> None:
    """Note the values of inserted nodes at them, as Dynamo does; where they cannot be computed, nothing is noted.

    A graph in which a method is called on a node without a value is none that AOTAutograd would cache.
    """
    for node in nodes:
        if node.op not in ("call_function", "call_method") or "example_value" in node.meta:
            continue
        target: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
        try:
            args, kwargs = map_arg((node.args, node.kwargs), lambda item: item.meta["example_value"])
            mode = fake_mode(tree_leaves((args, kwargs)))
            with mode, without_guards(mode), torch.no_grad():
                node.meta["example_value"] = target(*args, **kwargs)
        except Exception:  # of whatever kind: the graph is compiled without the value, but not cached
            continue
