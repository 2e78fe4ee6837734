"""Recognises calls of scaled_dot_product_attention."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch.fx import Node

from ..graph.axes import Layout, Misaligned, fresh, is_size, leaves
from ..graph.node_values import fake_tensor
from ..mask.expressions import AXES
from ..mask.mask_tensors import MaskTensor
from .operator_inputs import Input, choose, fewest_axes, laid_out
from .score_masks import ScoreMask, mask_tensor, separated
from .site import AttentionSite
from .walk import Factor, Walker


def sdpa_site(
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
    """The attention of a call with these arguments."""
    masks, passed = _masks(walker, attn_mask, node)
    site = AttentionSite(
        node,
        Input(query),
        Input(key),
        Input(value),
        masks=masks,
        is_causal=is_causal,
        scale=None if scale is None else (Factor(scale),),
        enable_gqa=enable_gqa,
        dropout_p=dropout_p,
        passed=passed,
    )
    return _without_repeats(walker, site)


def _masks(walker: Walker, mask: Node | None, user: Node) -> tuple[tuple[MaskTensor, ...], frozenset[Node]]:
    """The masks that the mask of a call of SDPA consists of, and the nodes that join them."""
    if mask is None:
        return (), frozenset()
    tensor = fake_tensor(mask)
    if tensor is None or tensor.dim() > 4:
        return (MaskTensor(mask, user, AXES, True, -math.inf),), frozenset()
    scores: Layout = (*((),) * (4 - tensor.dim()), *fresh(tensor.shape))
    keep, value = (None, 1.0) if tensor.is_floating_point() else (True, -math.inf)
    whole = ScoreMask(mask, user, scores[4 - tensor.dim() :], keep, value)
    try:
        parts, passed = separated(walker, whole)
    except Misaligned:
        parts, passed = [whole], []
    dims = {(), *map(leaves, scores)}
    if not all(dims.issuperset(map(leaves, part.layout)) for part in parts):
        parts, passed = [whole], []
    return tuple(mask_tensor(part, scores) for part in parts), frozenset(passed)


def _without_repeats(walker: Walker, site: AttentionSite) -> AttentionSite:
    """A site with the heads of key and value as they were before each was repeated for its query heads."""
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
    passed = site.passed.union(*(operands[-1].passed for operands in sources))
    return replace(site, key=inputs[0], value=inputs[1], enable_gqa=True, passed=passed)
