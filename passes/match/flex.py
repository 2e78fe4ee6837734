"""Recognises calls of flex_attention.

Such a call becomes the operator only where its mask_mod, and what its score_mod masks, are terms of the operator:
flex_attention never stores a mask over queries and keys, so none is made for it either. Its block mask must be made in
the graph from the same mask_mod, or be none: blocks that come in as tensors may say anything. What made the blocks is
left in the graph without a use.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Graph, GraphModule, Node

from ..graph.mutation import Writes
from ..graph.node_values import fake_tensor
from ..graph.operation_names import operation_name
from ..graph.read_operations import read_operation
from ..mask.expressions import AXES, Unreadable, is_predicate, level
from ..mask.reader import Reader, Reading
from ..mask.refused import Refused
from .flex_block_mask import BlockMask
from .flex_score_mod import ModifiedScore, ScoreModWalk
from .operator_inputs import Input
from .site import AttentionSite
from .walk import Factor, Walker

_INDICES = tuple(map(level, range(1, 5)))
"""The arguments b, h, q_idx and kv_idx, by the level at which ``create_block_mask`` maps over each."""


def flex_site(
    walker: Walker,
    node: Node,
    query: Node,
    key: Node,
    value: Node,
    score_mod: Node,
    block_mask: Sequence[Any],
    scale: float | Node,
    kernel_options: dict[str, Any],
    score_mod_other_buffers: Sequence[Any] = (),
    mask_mod_other_buffers: Sequence[Any] = (),
) -> AttentionSite | None:
    """The attention of a call of the higher-order operator; None if its output is not used."""
    outputs = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    if not outputs:
        return None
    blocks = BlockMask.of(block_mask)
    statistics = _unused(set(node.users) - set(outputs[:1]))
    site = AttentionSite(
        outputs[0],
        Input(query),
        Input(key),
        Input(value),
        enable_gqa=True,
        scores=frozenset([node]),
        passed=frozenset([node, score_mod, blocks.mask_mod, *(statistics or ())]),
    )
    try:
        if statistics is None:
            raise Refused("the log-sum-exp of the scores is used; call flex_attention without asking for it")
        score = _read_score_mod(walker, score_mod, score_mod_other_buffers)
        shape = _shape(query, key)
        visible = _read_mask_mod(walker, blocks, mask_mod_other_buffers, shape)
    except Refused as reason:
        return replace(site, obstacle=str(reason))
    return replace(
        site,
        mask_mod=_over_axes(sympy.And(score.visible, visible), shape),
        scale=(Factor(scale), Factor(score.factor), *([] if score.inner is None else [Factor(score.inner)])),
        softcap=None if score.inner is None else (Factor(score.factor),),
    )


def _unused(nodes: Iterable[Node]) -> set[Node] | None:
    """Nodes and what is computed from them, if nothing uses it."""
    found = set()
    for node in nodes:
        users = _unused(node.users)
        if users is None or (node.target is not operator.getitem and read_operation(node) is None):
            return None
        found |= {node, *users}
    return found


def _read_score_mod(walker: Walker, score_mod: Node, buffers: Sequence[Any]) -> ModifiedScore:
    graph = _graph(score_mod)
    try:
        reader = _ModReader(walker, graph, "score_mod", [None, *_INDICES, *buffers])
        return ScoreModWalk(graph, reader).find(_result(graph))
    except Unreadable as unreadable:
        raise Refused(f"the score_mod cannot be read: {unreadable}") from None


def _read_mask_mod(walker: Walker, blocks: BlockMask, buffers: Sequence[Any], shape: Sequence[Any]) -> Boolean:
    """Where a mask_mod and the blocks let a query see a key, as a predicate over `_INDICES`."""
    graph = _graph(blocks.mask_mod)
    try:
        reader = _ModReader(walker, graph, "mask_mod", [*_INDICES, *buffers])
        predicate = reader.read(_result(graph)).expression
    except Unreadable as unreadable:
        raise Refused(f"the mask_mod cannot be read: {unreadable}") from None
    if not is_predicate(predicate):
        raise Refused("the mask_mod does not give a boolean")
    _check_blocks(walker, blocks, predicate, shape)
    return predicate


def _check_blocks(walker: Walker, blocks: BlockMask, predicate: Boolean, shape: Sequence[Any]) -> None:
    """Raise Refused unless the blocks of a block mask show what its mask_mod does."""
    if any(node.op in ("placeholder", "get_attr") for node in blocks.nodes):
        raise Refused(
            "the block mask is made outside of the compiled function, where its blocks may be made from anything; "
            "call create_block_mask inside"
        )
    if any(walker.is_written(node) for node in _ancestors(blocks.nodes)):
        raise Refused("the block mask is made from tensors that are changed in place; make it without that")
    if blocks.leaves_all_to_mask_mod(walker.reader, shape[2:]):
        return
    mask = blocks.mask(shape)
    if mask is None or walker.reader.read(mask).expression != _over_axes(predicate, shape):
        raise Refused(
            "the blocks of the block mask are not known to be those of its mask_mod for these lengths; "
            "call create_block_mask with it, and with B and H where it depends on them"
        )


def _ancestors(nodes: Iterable[Node]) -> set[Node]:
    """Nodes and all tensors that they are computed from."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [source for source in node.all_input_nodes if fake_tensor(source) is not None]
    return found


def _over_axes(predicate: Boolean, shape: Sequence[Any]) -> Boolean:
    """A predicate over `_INDICES` as one over `AXES`; the index along an axis of size 1 is 0."""
    places = (sympy.Integer(0) if size == 1 else symbol for size, symbol in zip(shape, AXES, strict=True))
    return predicate.xreplace(dict(zip(_INDICES, places, strict=True)))


def _shape(query: Node, key: Node) -> tuple[Any, ...]:
    """The shape of the scores."""
    tensors = fake_tensor(query), fake_tensor(key)
    if tensors[0] is None or tensors[1] is None:
        raise Refused("the shapes of query and key are not known while compiling")
    return (*tensors[0].shape[:3], tensors[1].shape[2])


def _graph(mod: Node) -> Graph:
    module = getattr(mod.graph.owning_module, str(mod.target))
    assert isinstance(module, GraphModule)
    return module.graph


def _result(graph: Graph) -> Node:
    (result,) = graph.output_node().args
    if not isinstance(result, Node):
        raise Unreadable("it does not give a tensor")
    return result


class _ModReader(Reader):
    """Reads the graph of a score_mod or mask_mod, whose every tensor varies over `_INDICES`.

    Args:
        walker: Of the graph that calls it.
        graph: Of the mod.
        name: What the mod is.
        arguments: What its placeholders stand for: an index, or what the calling graph passes.

    Raises:
        Refused: It changes tensors in place, or takes some that are.
    """

    def __init__(self, walker: Walker, graph: Graph, name: str, arguments: Sequence[Any]) -> None:
        super().__init__(walker.reader.handlers)
        self.innermost: Node | None = None
        if any(map(Writes(graph.nodes).to, graph.nodes)):
            raise Refused(f"the {name} changes tensors in place; let it compute new ones")
        for placeholder, argument in zip(graph.find_nodes(op="placeholder"), arguments, strict=True):
            if isinstance(argument, sympy.Symbol):
                self.readings[placeholder] = Reading(argument, ())
            elif fake_tensor(argument) is not None:
                self.readings[placeholder] = walker.reader.read(argument)
                if walker.is_ever_changed(argument):
                    raise Refused(f"the {name} reads {argument.name}, which is changed in place; build it without that")

    def leaf(self, node: Node, tensor: torch.Tensor) -> sympy.Basic:
        """Nothing: only what the calling graph passes is a function of its own indices alone.

        Raises:
            Unreadable: Always.
        """
        self.innermost = self.innermost or node
        name = operation_name(self.innermost) or "a comparison of the score"
        raise Unreadable(f"it computes {name} in a way that is not followed")
