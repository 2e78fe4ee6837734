"""Finds attention in the graph that Dynamo hands to a backend: calls of SDPA or flex_attention, or written by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .axes import Misaligned, fresh, is_size, leaves
from .flex import flex_site
from .handwritten import handwritten_site
from .inputs import Input, choose, fewest_axes, laid_out
from .mask_operations import HANDLERS
from .masks import AXES, MaskTerm
from .operations import Product, operation_name, read_operation
from .site import AttentionSite
from .symbolic import Reader
from .values import fake_tensor
from .walk import Factor, Walker


def find_attention(graph: Graph, reader: Reader | None = None) -> Iterator[AttentionSite]:
    """The attention sites of a graph, in its order; the graph may change between two of them."""
    walker = Walker(graph, reader or Reader(HANDLERS))
    for node in list(graph.nodes):
        if node._erased:
            continue
        site: AttentionSite | None = None
        if operation_name(node) == "scaled_dot_product_attention":
            site = _sdpa_site(walker, node, *node.args, **node.kwargs)
        elif node.target is torch.ops.higher_order.flex_attention:
            site = flex_site(walker, node, *node.args, **node.kwargs)
        elif isinstance(product := read_operation(node), Product):
            site = handwritten_site(walker, node, product)
        if site is not None:
            yield site


def _sdpa_site(
    walker: Walker,
    node: Node,
    query: Node,
    key: Node,
    value: Node,
    attn_mask: Node | None = None,
    dropout_p: Any = 0.0,
    is_causal: Any = False,
    scale: Any = None,
    enable_gqa: Any = False,
) -> AttentionSite:
    site = AttentionSite(
        node,
        Input(query),
        Input(key),
        Input(value),
        masks=() if attn_mask is None else (_mask_term(attn_mask, node),),
        is_causal=is_causal,
        scale=None if scale is None else (Factor(scale),),
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
    )
    return _without_repeats(walker, site)


def _mask_term(mask: Node, user: Node) -> MaskTerm:
    tensor = fake_tensor(mask)
    added = tensor is not None and tensor.is_floating_point()
    rank = 4 if tensor is None else min(4, tensor.dim())
    return MaskTerm(mask, user, AXES[4 - rank :], None if added else True, 1.0 if added else -math.inf)


def _without_repeats(walker: Walker, site: AttentionSite) -> AttentionSite:
    """A site with the heads of key and value as they were before each was repeated for a group of query heads."""
    tensors = [fake_tensor(item.node) for item in (site.key, site.value)]
    query = fake_tensor(site.query.node)
    if query is None or any(tensor is None or tensor.dim() != 4 for tensor in tensors):
        return site
    key, value = (tensor.shape for tensor in tensors if tensor is not None)
    if not all(is_size(key[n], value[n]) for n in range(3)) or not is_size(query.shape[1], key[1]):
        return site
    batch, heads, keys, channels, value_channels = fresh((*key, value[3]))
    sources = [
        walker.operands(item.node, (batch, heads, keys, last), site.node, scaled=False)
        for item, last in ((site.key, channels), (site.value, value_channels))
    ]
    kept = tuple(x for x in leaves(heads) if x in fewest_axes(sources[0]) | fewest_axes(sources[1]))
    if len(kept) == len(leaves(heads)) or leaves(heads)[: len(kept)] != kept:
        return site
    try:
        inputs = [
            laid_out(choose(operands, layout), layout)
            for operands, layout in zip(
                sources, ((batch, kept, keys, channels), (batch, kept, keys, value_channels)), strict=True
            )
        ]
    except Misaligned:
        return site
    passed = frozenset(node for operands in sources for node in operands[-1].passed)
    return replace(site, key=inputs[0], value=inputs[1], enable_gqa=True, passed=passed)
