"""Finds attention in the graph that Dynamo hands to a backend: calls of SDPA or flex_attention, or written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from ..graph.operation_names import operation_name
from ..graph.operations import Product
from ..graph.read_operations import read_operation
from ..graph.torch_internals import flex_attention
from .flex import flex_site
from .handwritten import handwritten_site
from .sdpa import sdpa_site
from .site import AttentionSite
from .walk import Walker


def find_attention(walker: Walker, node: Node) -> AttentionSite | None:
    """The attention whose output a node is, if it is one."""
    args: tuple[Any, ...] = node.args
    kwargs: Mapping[str, Any] = node.kwargs
    if operation_name(node) == "scaled_dot_product_attention":
        return sdpa_site(walker, node, *args, **kwargs)
    if node.target is flex_attention:
        return flex_site(walker, node, *args, **kwargs)
    product = read_operation(node)
    return handwritten_site(walker, node, product) if isinstance(product, Product) else None
