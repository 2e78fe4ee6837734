"""Writes into the graph which queries see no key, where it can without a mask over queries and keys."""

from __future__ import annotations

import operator
from collections.abc import Callable

import sympy
import torch
from torch.fx import Graph, Node

from .expressions import AXES, QUERY
from .terms import Mask

Axes = dict[sympy.Symbol, sympy.Expr]


def emit_empty_rows(
    graph: Graph,
    mask: Mask,
    shape: tuple[sympy.Expr, ...],
    padding: Node | None,
    tensor: Callable[[sympy.Basic, Axes], Node],
    size: Callable[[sympy.Expr], int | Node],
) -> Node:
    """A boolean that broadcasts to [B, Hq, Lq, 1], true for queries that see no key.

    Args:
        graph: Where nodes are inserted, at its insertion point.
        mask: What queries see; some key is hidden.
        shape: Of the scores.
        padding: The key padding [B, Lk] of the mask, if it has one.
        tensor: Writes a predicate or whole numbers over axes as a tensor with a dimension for each.
        size: Writes a whole number.
    """
    call, method = graph.call_function, graph.call_method
    if mask.documents is not None or mask.rest != sympy.true:
        seen = tensor(mask.predicate, dict(zip(AXES, shape, strict=True)))
        return call(torch.logical_not, (method("any", (seen, -1, True)),))
    keys = size(shape[3])

    def position(expression: sympy.Expr) -> Node:
        return method("clamp", (tensor(expression, {QUERY: shape[2]}), 0, keys))

    end = QUERY + mask.offset + 1
    stop = position(end) if mask.is_causal else None
    start = None if mask.window is None else position(end - mask.window)
    if padding is None:
        empty = call(operator.le, (keys if stop is None else stop, 0 if start is None else start))
        return call(operator.getitem, (empty, (slice(None), None)))
    counts = call(torch.nn.functional.pad, (method("cumsum", (padding, -1)), (1, 0)))
    places = slice(-1, None) if stop is None else stop, slice(0, 1) if start is None else start
    empty = call(operator.le, tuple(call(operator.getitem, (counts, (slice(None), place))) for place in places))
    return call(operator.getitem, (empty, (slice(None), None, slice(None), None)))
