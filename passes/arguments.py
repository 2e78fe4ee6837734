"""Writes the arguments of operators into a graph, from a proven mask and the terms of the logits."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from .graph.axes import with_steps
from .graph.node_values import constant, symbolic_shape
from .graph.torch_internals import FloorDiv
from .logit_terms import known_product, softcap_of
from .mask.emit import Emitter, NotComputed, emit_size
from .mask.emit_empty_rows import emit_empty_rows
from .mask.empty_rows import EmptyRows
from .mask.expressions import AXES, BATCH, HEAD, KEY, QUERY, is_predicate
from .mask.refused import Refused
from .mask.terms import Mask, scores_shape
from .match.site import AttentionSite


def is_of_sdpa(mask: Mask) -> bool:
    """Whether SDPA needs no tensor for a mask: it hides nothing, or is the causal one."""
    return mask.predicate == sympy.true or mask == Mask(is_causal=True, sources=mask.sources)


class Arguments:
    """Writes arguments into one graph, at its insertion point; sites with the same mask share the tensors.

    Args:
        graph: The graph.
        leaves: The nodes that the unknown functions of masks stand for, by the functions' names.

    Attributes:
        tensors: What was written, by what it is.
    """

    def __init__(self, graph: Graph, leaves: Mapping[str, Node]) -> None:
        self.graph, self.leaves = graph, leaves
        self.tensors: dict[Any, Node] = {}

    def of_operator(self, mask: Mask, site: AttentionSite) -> dict[str, Any]:
        """The arguments of ``torch.ops.s2o.attention`` for masks and logits.

        Raises:
            Refused: They depend on something that the graph does not compute.
        """
        arguments = {**self._masking(mask, site), "scale": self._scale(site)}
        if site.softcap is not None:
            arguments["softcap"] = softcap_of(site.softcap)
        if site.sinks is not None:
            arguments["sinks"] = with_steps(site.sinks.node, site.sinks.steps)
        return arguments

    def of_sdpa(self, mask: Mask, site: AttentionSite) -> dict[str, Any]:
        """The arguments of SDPA for masks and scale.

        Raises:
            Refused: They depend on something that the graph does not compute.
        """
        arguments = {"scale": self._scale(site), "enable_gqa": bool(site.enable_gqa)}
        if is_of_sdpa(mask):
            return arguments | {"is_causal": True} if mask.is_causal else arguments
        axes = dict(zip(AXES, scores_shape(*site.query_and_key), strict=True))
        return arguments | {"attn_mask": self._tensor(mask.predicate, axes, site)}

    def empty_rows(self, mask: Mask, site: AttentionSite, padding: Node | None) -> Node:
        """A boolean that broadcasts to [B, Hq, Lq, 1], true for queries that see no key."""
        shape = scores_shape(*site.query_and_key)

        def emit() -> Node:
            return emit_empty_rows(
                self.graph,
                mask,
                shape,
                padding,
                tensor=lambda x, axes: self._tensor(x, axes, site),
                size=lambda x: self._size(x, site),
            )

        return self._shared(("empty rows", mask, shape), emit)

    def mean_of_values(self, value: Node, site: AttentionSite) -> Node:
        """The mean over the keys of a value [B, Hkv, Lk, Dv], as [B, Hq, 1, Dv]."""
        query, key = map(symbolic_shape, site.query_and_key)
        mean = self.graph.call_method("mean", (value, 2, True))
        group_size = self._size(FloorDiv(query[1], key[1]), site)
        return mean if group_size == 1 else self.graph.call_method("repeat_interleave", (mean, group_size, 1))

    def _scale(self, site: AttentionSite) -> float | Node | None:
        """The factor of the logits, as a number or as a node that computes it."""
        if site.scale is None:
            return None
        scale: Any = known_product(site.scale)
        for factor in site.scale:
            if isinstance(constant(factor.value), Node):
                function = operator.truediv if factor.inverted else operator.mul
                scale = self.graph.call_function(function, (scale, factor.value))
        return scale

    def _masking(self, mask: Mask, site: AttentionSite) -> dict[str, Any]:
        """The operator's arguments for a mask."""
        batch, heads, queries, keys = scores_shape(*site.query_and_key)
        arguments: dict[str, Any] = {"is_causal": mask.is_causal, "causal_offset": self._size(mask.offset, site)}
        if mask.window is not None:
            arguments["window"] = self._size(mask.window, site)
        if mask.key_padding != sympy.true:
            padding = self._expanded(mask.key_padding, {BATCH: batch, KEY: keys}, site)
            is_unmasked = mask.empty_rows is EmptyRows.UNMASKED
            arguments["key_padding"] = self._padding_or_empty(padding) if is_unmasked else padding
        if mask.documents is not None:
            of_queries, of_keys = mask.documents
            arguments["query_documents"] = self._expanded(of_queries, {BATCH: batch, QUERY: queries}, site)
            arguments["key_documents"] = self._expanded(of_keys, {BATCH: batch, KEY: keys}, site)
        if mask.rest != sympy.true:
            axes = {BATCH: batch, HEAD: heads, QUERY: queries, KEY: keys}
            arguments["mask"] = self._tensor(mask.rest, axes, site)
        return arguments

    def _size(self, expression: sympy.Expr, site: AttentionSite) -> int | Node:
        """A whole number as an argument of the operator."""
        try:
            return emit_size(self.graph, expression, site.node)
        except NotComputed:
            raise Refused(f"the mask depends on {expression}, which the graph does not compute as a number") from None

    def _tensor(self, expression: sympy.Basic, axes: dict[sympy.Symbol, sympy.Expr], site: AttentionSite) -> Node:
        """A predicate or whole numbers over `axes` as a tensor that broadcasts to their sizes."""
        return self._shared((expression, tuple(axes.items())), lambda: self._emitted(expression, axes, site))

    def _expanded(self, expression: sympy.Basic, axes: dict[sympy.Symbol, sympy.Expr], site: AttentionSite) -> Node:
        """A predicate or whole numbers over `axes` as a tensor of their sizes."""

        def emit() -> Node:
            node = self._emitted(expression, axes, site)
            return self.graph.call_method("expand", (node, *(self._size(size, site) for size in axes.values())))

        return self._shared(("expanded", expression, tuple(axes.items())), emit)

    def _emitted(self, expression: sympy.Basic, axes: dict[sympy.Symbol, sympy.Expr], site: AttentionSite) -> Node:
        emitter = Emitter(self.graph, self.leaves, axes, site.node, site.query_and_key[0].device)
        try:
            return emitter.predicate(expression) if is_predicate(expression) else emitter.integers(expression)
        except NotComputed:
            raise Refused(f"the mask depends on {expression}, which the graph does not compute") from None

    def _padding_or_empty(self, padding: Node) -> Node:
        """A key padding [B, Lk] that hides nothing of a batch entry of which it hid all."""

        def emit() -> Node:
            has_keys = self.graph.call_method("any", (padding, -1, True))
            is_empty = self.graph.call_function(torch.logical_not, (has_keys,))
            return self.graph.call_function(operator.or_, (padding, is_empty))

        return self._shared(("unmasked", padding), emit)

    def _shared(self, key: Any, emit: Callable[[], Node]) -> Node:
        """The tensor that was written for a key, or is now."""
        if key not in self.tensors:
            self.tensors[key] = emit()
        return self.tensors[key]
