"""Puts an operator where an attention site is, and removes the nodes that nothing uses then."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, Node

from .arguments import Arguments
from .graph.axes import Step, with_steps
from .graph.memory_order import is_independent_of_strides, memory_order
from .graph.mutation import Writes
from .graph.node_values import fake_tensor
from .mask.empty_rows import EmptyRows
from .mask.reader import Reader
from .mask.refused import Refused
from .mask.terms import Mask
from .match.site import AttentionSite


class Replacer:
    """Replaces the sites of one graph.

    Attributes:
        arguments: Writes the arguments of operators into the graph.
        changed: Whether a site was replaced.
    """

    def __init__(self, graph: Graph, writes: Writes, reader: Reader) -> None:
        self.graph, self.writes, self.reader = graph, writes, reader
        self.arguments = Arguments(graph, reader.leaves)
        self.changed = False

    @contextmanager
    def inserting_before(self, node: Node) -> Iterator[None]:
        """A context that inserts nodes before one, and removes them where the site is refused after all."""
        last, known = node.prev, dict(self.arguments.tensors)
        try:
            with self.graph.inserting_before(node):
                yield
        except Refused:
            self.arguments.tensors = known
            while node.prev is not last:
                self.graph.erase_node(node.prev)
            raise

    def put(self, function: Callable[..., Any], arguments: dict[str, Any], site: AttentionSite, mask: Mask) -> Node:
        """A call of an operator of query, key and value, whose output is laid out and used as a site's is."""
        query, key, value = (with_steps(item.node, item.steps) for item in (site.query, site.key, site.value))
        if isinstance(arguments["scale"], Node):  # The operator's is a constant, which would fix the length.
            query, arguments["scale"] = self.graph.call_function(operator.mul, (query, arguments["scale"])), 1.0
        node = self.graph.call_function(function, (query, key, value), arguments)
        output = node
        if mask.empty_rows is EmptyRows.MEAN:
            empty = self.arguments.empty_rows(mask, site, arguments.get("key_padding"))
            mean = self.arguments.mean_of_values(value, site)
            output = self.graph.call_function(torch.where, (empty, mean, node))
        output = with_steps(output, site.output)
        node.meta = dict(site.node.meta)
        if output is not node:
            output.meta = dict(site.node.meta)
            node.meta.pop("example_value", None)
        site.node.replace_all_uses_with(self.laid_out(output, site.node))
        self.changed = True
        return node

    def laid_out(self, node: Node, replaced: Node) -> Node:
        """The operator's output, with the strides of `replaced` where its users depend on them."""
        output = fake_tensor(replaced)
        if output is None or is_independent_of_strides(replaced):
            return node
        order = memory_order(output)
        steps: tuple[Step, ...] = (("contiguous", ()),)
        if order != sorted(order):
            steps = ("permute", tuple(order)), *steps, ("permute", tuple(map(order.index, sorted(order))))
        with self.graph.inserting_before(node.next):
            copy = with_steps(node, steps)
        copy.meta = dict(replaced.meta)
        return copy

    def unused_without(self, site: AttentionSite) -> set[Node]:
        """A site's node and all that computes only its masks, scores and inputs."""
        removable = site.scores | site.passed | self.reader.understood
        found = {site.node}
        for node in reversed(self.graph.nodes):
            if node in removable and found.issuperset(self.writes.readers(node)):
                found.add(node)
        return found

    def erase(self, nodes: set[Node]) -> None:
        """Remove those of the nodes that nothing uses."""
        for node in reversed(self.graph.nodes):
            if node in nodes and not node.users:
                self.graph.erase_node(node)
                self.reader.understood.discard(node)
