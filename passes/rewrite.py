"""Decides which attention sites become ``torch.ops.s2o.attention``, and rewrites them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from ..ops.choice import choose_sparse, why_dense
from ..ops.config import S2OConfig
from ..ops.validation import DTYPES, MAX_HEAD_DIM
from .axes import Step
from .decompose import decompose
from .emit import Emitter, NotComputed, emit_size
from .emit_empty_rows import emit_empty_rows
from .empty_rows import EmptyRows
from .find import find_attention
from .masks import BATCH, HEAD, KEY, QUERY, Mask, NotProven, Prover, scores_shape
from .mutation import Writes
from .nested import nested_graphs
from .operations import Cleaned, operation_name, read_operation
from .report import Decision, site_name, source_location
from .site import AttentionSite
from .symbolic import is_predicate
from .torch_internals import FloorDiv, guard_or_false, is_erased
from .values import constant, fake_tensor, symbolic_shape
from .walk import Factor, Walker

_LAYOUTS = {"transpose", "permute", "swapaxes", "movedim", "to", "float", "half", "bfloat16"}
_STORING = {"reshape", "flatten", "contiguous", "matmul", "linear", "einsum"}


class Refused(Exception):
    """A site stays as it is; the message is the reason, in one sentence that a user can act on."""


def rewrite(
    module: GraphModule, config: S2OConfig, of_site: Callable[[str], S2OConfig] | None = None
) -> list[Decision]:
    """Replace every attention site that can be proven safe, in place; the rest of the graph stays as it is.

    The graphs that it calls are rewritten too; what they take from it is not known there.

    Args:
        module: The graph that Dynamo hands to a backend.
        config: The settings of the operator.
        of_site: The settings of a site by name, by default `config`; raises `Refused` for one that is to stay dense.

    Returns:
        One decision per site. The node of a rewritten site has its decision in ``meta["s2o_decision"]``.
    """
    chosen = of_site or (lambda name: config)
    return [decision for graph in nested_graphs(module) for decision in _rewrite_graph(graph, config, chosen)]


def _rewrite_graph(module: GraphModule, config: S2OConfig, of_site: Callable[[str], S2OConfig]) -> list[Decision]:
    """Rewrite the sites of one graph, and not those of the graphs that it calls."""
    rewriter = _Rewriter(module.graph, config, of_site)
    decisions = [decision for node in list(module.graph.nodes) for decision in rewriter.visit(node)]
    if any(decision.rewritten for decision in decisions):
        module.graph.lint()
        module.recompile()
    return decisions


class _Rewriter:
    def __init__(self, graph: Graph, config: S2OConfig, of_site: Callable[[str], S2OConfig]) -> None:
        self.graph, self.config, self.of_site = graph, config, of_site
        self.writes = Writes(graph.nodes)
        self.prover = Prover(self.writes)
        self.walker = Walker(self.writes, self.prover.reader)
        self.tensors: dict[Any, Node] = {}

    def visit(self, node: Node) -> list[Decision]:
        """Rewrite what a node computes, or leave it, and say what was done to each attention site in it."""
        if is_erased(node):
            return []
        decomposition = decompose(node)
        if decomposition is None:
            site = find_attention(self.walker, node)
            return [] if site is None else [self.decide(site)]
        self.writes.add(decomposition.nodes)
        decisions = [decision for part in decomposition.nodes for decision in self.visit(part)]
        if any(decision.rewritten for decision in decisions):
            decomposition.keep()
        else:
            decomposition.undo()
        return decisions

    def decide(self, site: AttentionSite) -> Decision:
        """Rewrite one site or leave it, and say which."""
        tensors = {"query": site.query, "key": site.key, "value": site.value}
        decision = Decision(
            name=site_name(site.node),
            location=source_location(site.node),
            shapes={name: _shape(item.tensor) for name, item in tensors.items()},
            rewritten=False,
            reason="",
        )
        try:
            mask = self.accept(site)
            self.replace(site, mask, self.unused_without(site), self.of_site(decision.name), decision)
        except (Refused, NotProven) as refused:
            decision.reason = str(refused)
            return decision
        decision.rewritten, decision.mask = True, "; ".join([str(mask), *_logit_terms(site)])
        proven = "the mask is proven" if mask.rest == sympy.true else "what is not proven of the mask is passed on"
        decision.reason = f"{proven} and the call may be long enough for sparse attention"
        return decision

    def accept(self, site: AttentionSite) -> Mask:
        """What the masks of a site say, if the site can become the operator."""
        if site.obstacle:
            raise Refused(site.obstacle)
        query, key, value = (item.tensor for item in (site.query, site.key, site.value))
        if query is None or key is None or value is None:
            raise Refused("the shapes of query, key and value are not known while compiling")
        _check_tensors(query, key, value, constant(site.enable_gqa))
        _check_call(site)
        _check_length(query, key, self.config)
        return self.mask(site, query, key)

    def mask(self, site: AttentionSite, query: torch.Tensor, key: torch.Tensor) -> Mask:
        """What the masks and the causal flag of a site say together."""
        if site.mask_mod is not None:
            return self.prover.prove_mask_mod(site.mask_mod, query, key)
        if not site.is_causal:
            mask = self.prover.prove(site.masks, query, key, has_sinks=site.sinks is not None)
            if mask.empty_rows is EmptyRows.MEAN and any(isinstance(read_operation(x), Cleaned) for x in site.scores):
                raise Refused("NaN of the probabilities is replaced, and masks are finite; hide keys with -inf")
            return mask
        if site.masks:
            raise Refused("attn_mask and is_causal=True exclude each other; pass one of them")
        return Mask(is_causal=True)

    def replace(
        self, site: AttentionSite, mask: Mask, unused: set[Node], config: S2OConfig, decision: Decision
    ) -> None:
        """Put the operator where a site is, and remove what is then unused.

        Raises:
            Refused: The operator cannot compute what the site does; the site is as it was.
        """
        if not site.scores <= unused:
            raise Refused("the attention scores or probabilities are used elsewhere; do not return or keep them")
        with self.graph.inserting_before(site.node):
            arguments = {**self.masking(mask, site), **self.logits(site), "site": decision.name}
            inputs = tuple(self.apply(item.steps, item.node) for item in (site.query, site.key, site.value))
            node = self.graph.call_function(torch.ops.s2o.attention.default, inputs, arguments | config.arguments())
            output = node
            if mask.empty_rows is EmptyRows.MEAN:
                output = self.with_means(node, inputs[2], mask, site, arguments.get("key_padding"))
            output = self.apply(site.output, output)
            node.meta = dict(site.node.meta, s2o_decision=decision)
            if output is not node:
                output.meta = dict(site.node.meta)
                node.meta.pop("example_value", None)
        site.node.replace_all_uses_with(self.laid_out(output, site.node))
        self.erase(unused)

    def with_means(self, output: Node, value: Node, mask: Mask, site: AttentionSite, padding: Node | None) -> Node:
        """The operator's output with the mean of all values [B, Hkv, Lk, Dv] where a query sees no key."""
        query, key = site.query.tensor, site.key.tensor
        assert query is not None and key is not None
        shape = scores_shape(query, key)
        empty = self.shared(
            ("empty rows", mask, shape),
            lambda: emit_empty_rows(
                self.graph,
                mask,
                shape,
                padding,
                lambda x, axes: self.tensor(x, axes, site),
                lambda x: self.size(x, site),
            ),
        )
        mean = self.graph.call_method("mean", (value, 2, True))
        groups = self.size(FloorDiv(shape[1], symbolic_shape(key)[1]), site)
        repeated = mean if groups == 1 else self.graph.call_method("repeat_interleave", (mean, groups, 1))
        return self.graph.call_function(torch.where, (empty, repeated, output))

    def logits(self, site: AttentionSite) -> dict[str, Any]:
        """The operator's arguments for what is done to the logits before they are masked."""
        arguments: dict[str, Any] = {"scale": self.scale(site)}
        if site.softcap is not None:
            arguments["softcap"] = _softcap(site.softcap)
        if site.sinks is not None:
            arguments["sinks"] = self.apply(site.sinks.steps, site.sinks.node)
        return arguments

    def scale(self, site: AttentionSite) -> float | Node | None:
        """The factor of the logits, as a number or as a node that computes it."""
        if site.scale is None:
            return None
        scale: Any = math.prod(_known(site.scale))
        for factor in site.scale:
            if isinstance(constant(factor.value), Node):
                function = operator.truediv if factor.inverted else operator.mul
                scale = self.graph.call_function(function, (scale, factor.value))
        return scale

    def apply(self, steps: tuple[Step, ...], node: Node) -> Node:
        """The result of tensor methods that are called one after another."""
        for name, arguments in steps:
            node = self.graph.call_method(name, (node, *arguments))
        return node

    def unused_without(self, site: AttentionSite) -> set[Node]:
        """A site's node and all that computes only its masks, scores and inputs."""
        removable = site.scores | site.passed | self.prover.reader.understood
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
                self.prover.reader.understood.discard(node)

    def laid_out(self, node: Node, replaced: Node) -> Node:
        """The operator's output, in memory as that of `replaced` where its users may tell."""
        output = fake_tensor(replaced)
        if output is None or _is_read_alike_in_any_memory(replaced):
            return node
        order = _memory_order(output)
        steps: tuple[Step, ...] = (("contiguous", ()),)
        if order != sorted(order):
            steps = ("permute", tuple(order)), *steps, ("permute", tuple(map(order.index, sorted(order))))
        with self.graph.inserting_before(node.next):
            copy = self.apply(steps, node)
        copy.meta = dict(replaced.meta)
        return copy

    def masking(self, mask: Mask, site: AttentionSite) -> dict[str, Any]:
        """The operator's arguments for a mask; sites with the same mask share the tensors."""
        query, key = site.query.tensor, site.key.tensor
        assert query is not None and key is not None
        batch, heads, queries, keys = scores_shape(query, key)
        arguments: dict[str, Any] = {"is_causal": mask.is_causal, "causal_offset": self.size(mask.offset, site)}
        if mask.window is not None:
            arguments["window"] = self.size(mask.window, site)
        if mask.key_padding != sympy.true:
            axes = {BATCH: batch, KEY: keys}
            padding = self.tensor(mask.key_padding, axes, site, expanded=True)
            if mask.empty_rows is EmptyRows.UNMASKED:
                padding = self.shared(("unmasked", padding), lambda: self.or_empty(padding))
            arguments["key_padding"] = padding
        if mask.documents is not None:
            for name, axis, size, value in (
                ("query_documents", QUERY, queries, mask.documents[0]),
                ("key_documents", KEY, keys, mask.documents[1]),
            ):
                arguments[name] = self.tensor(value, {BATCH: batch, axis: size}, site, expanded=True)
        if mask.rest != sympy.true:
            axes = {BATCH: batch, HEAD: heads, QUERY: queries, KEY: keys}
            arguments["mask"] = self.tensor(mask.rest, axes, site)
        return arguments

    def size(self, expression: sympy.Expr, site: AttentionSite) -> int | Node:
        """A whole number as an argument of the operator."""
        try:
            return emit_size(self.graph, expression, site.node)
        except NotComputed:
            raise Refused(f"the mask depends on {expression}, which the graph does not compute as a number") from None

    def tensor(
        self, expression: sympy.Basic, axes: dict[sympy.Symbol, sympy.Expr], site: AttentionSite, expanded: bool = False
    ) -> Node:
        """A predicate or whole numbers over `axes` as a tensor, `expanded` to their sizes if asked for."""
        query = site.query.tensor
        assert query is not None
        emitter = Emitter(self.graph, self.prover.reader.leaves, axes, site.node, query.device)

        def emit() -> Node:
            node = emitter.predicate(expression) if is_predicate(expression) else emitter.integers(expression)
            if not expanded:
                return node
            sizes = (self.size(size, site) for size in axes.values())
            return self.graph.call_method("expand", (node, *sizes))

        return self.shared((expression, tuple(axes.items()), expanded), emit)

    def or_empty(self, padding: Node) -> Node:
        """A key padding [B, Lk] that hides nothing of a batch entry of which it hid all."""
        seen = self.graph.call_method("any", (padding, -1, True))
        return self.graph.call_function(operator.or_, (padding, self.graph.call_function(torch.logical_not, (seen,))))

    def shared(self, key: Any, emit: Callable[[], Node]) -> Node:
        """The tensor that was emitted for a key, or is now."""
        if key not in self.tensors:
            self.tensors[key] = emit()
        return self.tensors[key]


def _memory_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions of a tensor as they lie in memory, outermost first."""
    strides = tensor.stride()

    def compare(one: int, other: int) -> int:
        return guard_or_false(strides[one] < strides[other]) - guard_or_false(strides[one] > strides[other])

    places = list(range(tensor.dim()))
    return places if tensor.is_contiguous() else sorted(places, key=functools.cmp_to_key(compare))


def _is_read_alike_in_any_memory(node: Node) -> bool:
    """Whether all users of a tensor, through transposes, store its elements anew or multiply with it."""
    for user in node.users:
        name = operation_name(user)
        if name in _LAYOUTS and not _is_read_alike_in_any_memory(user):
            return False
        if name not in _LAYOUTS | _STORING:
            return False
    return True


def _known(factors: tuple[Factor, ...]) -> list[float]:
    """The factors that are known while compiling."""
    numbers = (Factor(constant(factor.value), factor.inverted).number for factor in factors)
    return [number for number in numbers if number is not None]


def _softcap(factors: tuple[Factor, ...]) -> float:
    return abs(math.prod(_known(factors)))


def _logit_terms(site: AttentionSite) -> list[str]:
    """What is done to the logits besides scaling and masking, in words."""
    capped = [] if site.softcap is None else [f"soft cap {_softcap(site.softcap):g}"]
    return capped + ["sinks"] * (site.sinks is not None)


def _shape(tensor: torch.Tensor | None) -> tuple[int | str, ...]:
    return () if tensor is None else tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: Any) -> None:
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4:
            raise Refused(f"{name} has {tensor.dim()} dimensions; pass [batch, heads, length, channels]")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise Refused(f"{name} is sparse or nested; pass a dense tensor")
        if tensor.dtype not in DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise Refused(f"{name} is {kind}; use float16, bfloat16 or float32")
        if not guard_or_false(tensor.shape[3] <= MAX_HEAD_DIM):
            raise Refused(f"{name} has {tensor.shape[3]} channels a head; at most {MAX_HEAD_DIM} are supported")
        if not guard_or_false(tensor.shape[0] == query.shape[0]):
            raise Refused(f"{name} has another batch size than query; expand it to the batch of query")
    if query.device.type not in ("cpu", "cuda"):
        raise Refused(f"the tensors are on {query.device}; use a CPU or a CUDA device")
    _check_heads(query.shape[1], key.shape[1], value.shape[1], enable_gqa)


def _check_heads(query: int, key: int, value: int, enable_gqa: Any) -> None:
    if not guard_or_false(key == value):
        raise Refused(f"key has {key} heads and value {value}; expand them to the same number")
    if guard_or_false(query == key):
        return
    if enable_gqa is not True and not guard_or_false(key == 1):
        raise Refused(f"query has {query} heads and key {key}; pass enable_gqa=True")
    if not guard_or_false(query % key == 0):
        raise Refused(f"the {query} heads of query are not a multiple of the {key} heads of key")


def _check_call(site: AttentionSite) -> None:
    if constant(site.dropout_p) != 0:
        raise Refused("dropout is active; call model.eval() or set dropout_p to 0")
    if site.softcap is not None and len(_known(site.softcap)) < len(site.softcap):
        raise Refused("the soft-cap is computed while the model runs; use a number")
    if isinstance(site.is_causal, Node):
        raise Refused("is_causal is computed in the graph; pass True or False")
    output = fake_tensor(site.node)
    if output is None or output.requires_grad:
        raise Refused("gradients are needed and the operator has no backward; run under torch.no_grad()")


def _check_length(query: torch.Tensor, key: torch.Tensor, config: S2OConfig) -> None:
    if choose_sparse(query.shape[2], key.shape[2], query.device, config) is False:
        raise Refused(why_dense(query.shape[2], key.shape[2], query.device, config))
