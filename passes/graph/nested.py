"""The graphs that a graph calls, as branches of torch.cond and regions that are compiled once."""

from __future__ import annotations

from operator import attrgetter

from torch.fx import GraphModule


def nested_graphs(module: GraphModule) -> list[GraphModule]:
    """A module with a graph, and those that its graph uses, directly or through others, each once."""
    found = [module]
    for outer in found:
        for node in outer.graph.find_nodes(op="get_attr"):
            inner = attrgetter(node.target)(outer)
            if isinstance(inner, GraphModule) and inner not in found:
                found.append(inner)
    return found
