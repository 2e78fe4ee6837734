"""Finds attention in the graph that Dynamo hands to a backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node


@dataclass(frozen=True)
class AttentionSite:
    """One attention call, with the arguments of ``scaled_dot_product_attention`` by name.

    Attributes:
        node: The node whose value is the attention's output.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        mask: The attention mask, or None.
        is_causal: Whether query i sees only the keys up to i, counted from the top left.
        scale: The factor of the logits: a number, a node that holds one, or None for D ** -0.5.
        enable_gqa: Whether fewer key heads than query heads are allowed.
        dropout_p: The dropout probability, or a node that holds it.
    """

    node: Node
    query: Node
    key: Node
    value: Node
    mask: Node | None
    is_causal: bool | Node
    scale: float | Node | None
    enable_gqa: bool | Node
    dropout_p: float | Node


def find_attention(graph: Graph) -> Iterator[AttentionSite]:
    """The attention sites of a graph, in its order."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is torch.nn.functional.scaled_dot_product_attention:
            yield _sdpa_site(node, *node.args, **node.kwargs)


def _sdpa_site(
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
    return AttentionSite(node, query, key, value, attn_mask, is_causal, scale, enable_gqa, dropout_p)
