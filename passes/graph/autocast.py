"""The autocast regions of a graph."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.fx import Node

from .torch_internals import enter_autocast, exit_autocast


def autocast_at(node: Node) -> ExitStack:
    """The autocast regions of a graph that a node is in, as a context."""
    regions: list[Any] = []
    for other in node.graph.nodes:
        if other is node:
            break
        if other.target is enter_autocast:
            regions.append(other)
        elif other.target is exit_autocast:
            regions.remove(other.args[0])
    stack = ExitStack()
    for region in regions:
        stack.enter_context(torch.autocast(*region.args))
    return stack
