"""Decides which attention sites become ``torch.ops.s2o.attention``, and rewrites them."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from ..ops.config import S2OConfig
from ..ops.dispatch import choose_sparse, why_dense
from ..ops.validation import DTYPES, MAX_HEAD_DIM, dtype_name
from .axes import Step
from .decompose import decompose
from .emit import Emitter, NotComputed, emit_size
from .emit_empty_rows import emit_empty_rows
from .empty_rows import EmptyRows
from .find import find_attention
from .masks import AXES, Mask, NotProven, Prover, scores_shape
from .metadata import as_computed
from .mutation import Writes
from .nested import nested_graphs
from .operations import Cleaned, operation_name, read_operation
from .regions import autocast_at
from .report import Decision, site_name, source_location
from .site import AttentionSite
from .symbolic import BATCH, HEAD, KEY, QUERY, is_predicate
from .torch_internals import FloorDiv, guard_or_false, is_erased
from .values import constant, fake_tensor, is_floating, needs_gradients, symbolic_shape, why_unknown
from .walk import Factor, Walker

_LAYOUTS = {"transpose", "permute", "swapaxes", "movedim", "to", "float", "half", "bfloat16"}
_VIEWING = {"reshape", "flatten"}
"""What stores elements anew only where it cannot view them, as it can where sizes are 1."""
_STORING = _VIEWING | {"contiguous", "matmul", "linear", "einsum"}


class Refused(Exception):
    """A site stays as it is; the message is the reason, in one sentence that a user can act on."""


def rewrite(
    module: GraphModule,
    config: S2OConfig,
    of_site: Callable[[str], S2OConfig] | None = None,
    fuse_dense: bool = False,
) -> list[Decision]:
    """Replace every attention site that can be proven safe, in place; the rest of the graph stays as it is.

    The graphs that it calls are rewritten too; what they take from it is not known there.

    Args:
        module: The graph that Dynamo hands to a backend.
        config: The settings of the operator.
        of_site: The settings of a site by name, by default `config`; raises `Refused` for one that is to stay dense.
        fuse_dense: Whether attention that is written out and stays dense becomes a call of SDPA where it is proven to
            be one.

    Returns:
        One decision per site. The node of a rewritten site has its decision in ``meta["s2o_decision"]``.
    """
    chosen = of_site or (lambda name: config)
    return [
        decision for graph in nested_graphs(module) for decision in _rewrite_graph(graph, config, chosen, fuse_dense)
    ]


def _rewrite_graph(
    module: GraphModule, config: S2OConfig, of_site: Callable[[str], S2OConfig], fuse_dense: bool
) -> list[Decision]:
    """Rewrite the sites of one graph, and not those of the graphs that it calls."""
    with as_computed(module.graph) as out_of_place:
        rewriter = _Rewriter(module.graph, config, of_site, fuse_dense)
        decisions = [decision for node in list(module.graph.nodes) for decision in rewriter.visit(node)]
    if rewriter.changed:
        module.graph.lint()
        module.recompile()
    else:
        out_of_place.undo()
    return decisions


class _Rewriter:
    def __init__(self, graph: Graph, config: S2OConfig, of_site: Callable[[str], S2OConfig], fuse_dense: bool) -> None:
        self.graph, self.config, self.of_site, self.fuse_dense = graph, config, of_site, fuse_dense
        self.changed = False
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
            return self.visit_site(node, self.fuse_dense)
        self.writes.add(decomposition.nodes)
        decisions = [decision for part in decomposition.nodes for decision in self.visit_site(part, fuse_dense=False)]
        if any(decision.rewritten for decision in decisions):
            decomposition.keep()
        else:
            decomposition.undo()
        return decisions

    def visit_site(self, node: Node, fuse_dense: bool) -> list[Decision]:
        """Rewrite the attention site whose output a node is, if it is one, or leave it, and say which."""
        site = None if is_erased(node) else find_attention(self.walker, node)
        if site is None:
            return []
        decision = self.decide(site)
        if fuse_dense and not decision.rewritten:
            self.fuse(site)
        return [decision]

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
        query, key = self.check_inputs(site)
        _check_call(site)
        _check_length(query, key, self.config)
        return self.mask(site, query, key)

    def check_inputs(self, site: AttentionSite) -> tuple[torch.Tensor, torch.Tensor]:
        """The fake tensors of a site's query and key, if the operator takes them and its value."""
        if site.obstacle:
            raise Refused(site.obstacle)
        query, key, value = (item.tensor for item in (site.query, site.key, site.value))
        if query is None or key is None or value is None:
            raise Refused(_why_unknown(site))
        _check_tensors(query, key, value, constant(site.enable_gqa))
        _check_dtype(site, query)
        return query, key

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
        _check_scores(site, unused)
        with self.graph.inserting_before(site.node), self.removing_if_refused(site.node):
            arguments = {**self.masking(mask, site), **self.logits(site), "site": decision.name, **config.arguments()}
            node = self.put(torch.ops.s2o.attention.default, arguments, site, mask)
        node.meta["s2o_decision"] = decision
        self.erase(unused)

    def fuse(self, site: AttentionSite) -> None:
        """Put SDPA where attention is written out that stays dense, if it is proven to be what SDPA computes."""
        with suppress(Refused, NotProven), self.graph.inserting_before(site.node), self.removing_if_refused(site.node):
            mask = self.accept_dense(site)
            unused = self.unused_without(site)
            _check_scores(site, unused)
            arguments = {"scale": self.scale(site), "enable_gqa": bool(site.enable_gqa)}
            self.put(scaled_dot_product_attention, arguments | self.dense_masking(mask, site), site, mask)
            self.erase(unused)

    def accept_dense(self, site: AttentionSite) -> Mask:
        """What the masks of a site say, if it is written out and SDPA computes the same, with the same gradients."""
        query, key = self.check_inputs(site)
        if not site.scores or site.softcap is not None or site.sinks is not None or not _is_positive(site.scale):
            raise Refused("this is not what SDPA computes")
        if not _gains_by_fusion(query):
            raise Refused("SDPA is not faster")
        if needs_gradients(site.node) and self.writes.to(site.node):
            raise Refused("SDPA keeps its output for the gradients, and it is changed in place")
        mask = self.mask(site, query, key)
        if mask.empty_rows is EmptyRows.UNMASKED:
            raise Refused("SDPA gives other values to queries that see no key")
        if not _keeps_gradients(site) or (needs_gradients(site.node) and not _shows_each_query_a_key(mask, query, key)):
            raise Refused("SDPA has other gradients")
        return mask

    def dense_masking(self, mask: Mask, site: AttentionSite) -> dict[str, Any]:
        """The arguments of SDPA for a mask."""
        if mask == Mask(is_causal=True, sources=mask.sources):
            return {"is_causal": True}
        if mask.predicate == sympy.true:
            return {}
        assert site.query.tensor is not None and site.key.tensor is not None
        axes = dict(zip(AXES, scores_shape(site.query.tensor, site.key.tensor), strict=True))
        return {"attn_mask": self.tensor(mask.predicate, axes, site)}

    def put(self, function: Callable[..., Any], arguments: dict[str, Any], site: AttentionSite, mask: Mask) -> Node:
        """A call of an operator of query, key and value, whose output is laid out and used as a site's is."""
        query, key, value = (self.apply(item.steps, item.node) for item in (site.query, site.key, site.value))
        if isinstance(arguments["scale"], Node):  # The operator's is a constant, which would fix the length.
            query, arguments["scale"] = self.graph.call_function(operator.mul, (query, arguments["scale"])), 1.0
        node = self.graph.call_function(function, (query, key, value), arguments)
        output = node
        if mask.empty_rows is EmptyRows.MEAN:
            output = self.with_means(node, value, mask, site, arguments.get("key_padding"))
        output = self.apply(site.output, output)
        node.meta = dict(site.node.meta)
        if output is not node:
            output.meta = dict(site.node.meta)
            node.meta.pop("example_value", None)
        site.node.replace_all_uses_with(self.laid_out(output, site.node))
        self.changed = True
        return node

    @contextmanager
    def removing_if_refused(self, before: Node) -> Iterator[None]:
        """A context that removes the nodes that were put before one where a site is refused after all."""
        last, known = before.prev, dict(self.tensors)
        try:
            yield
        except Refused:
            self.tensors = known
            while before.prev is not last:
                self.graph.erase_node(before.prev)
            raise

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
            try:
                node = emitter.predicate(expression) if is_predicate(expression) else emitter.integers(expression)
            except NotComputed:
                raise Refused(f"the mask depends on {expression}, which the graph does not compute") from None
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


def _is_contiguous(node: Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_contiguous()


def _is_read_alike_in_any_memory(node: Node) -> bool:
    """Whether all users of a tensor, through transposes, store its elements anew or multiply with it."""
    for user in node.users:
        name = operation_name(user)
        if name in _LAYOUTS and not _is_read_alike_in_any_memory(user):
            return False
        if name not in _LAYOUTS | _STORING or (name in _VIEWING and not _is_contiguous(user)):
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


def _why_unknown(site: AttentionSite) -> str:
    """Why the tensor of query, key or value is not known."""
    for name, item in {"query": site.query, "key": site.key, "value": site.value}.items():
        kind = why_unknown(item.node) if item.tensor is None else None
        if kind is not None:
            return f"{name} is {kind}"
    return "the shapes of query, key and value are not known while compiling"


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: Any) -> None:
    for name, tensor in {"query": query, "key": key, "value": value}.items():
        if tensor.dim() != 4:
            raise Refused(f"{name} has {tensor.dim()} dimensions; pass [batch, heads, length, channels]")
        if tensor.dtype not in DTYPES:
            raise Refused(f"{name} is {dtype_name(tensor.dtype)}; use float16, bfloat16 or float32")
        if not guard_or_false(tensor.shape[3] <= MAX_HEAD_DIM):
            raise Refused(f"{name} has {tensor.shape[3]} channels a head; at most {MAX_HEAD_DIM} are supported")
        if not guard_or_false(tensor.shape[0] == query.shape[0]):
            raise Refused(f"{name} has another batch size than query; expand it to the batch of query")
    if query.device.type not in ("cpu", "cuda"):
        raise Refused(f"the tensors are on {query.device}; use a CPU or a CUDA device")
    _check_heads(query.shape[1], key.shape[1], value.shape[1], enable_gqa)


def _check_dtype(site: AttentionSite, query: torch.Tensor) -> None:
    """Refuse a site that gives another dtype than the operator: under vmap not all is cast that autocast casts."""
    output, device = fake_tensor(site.node), query.device.type
    with autocast_at(site.node):
        casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        given = torch.get_autocast_dtype(device) if casts else query.dtype
    for name, arguments in site.output:
        given = arguments[0] if name == "to" else given
    if output is not None and output.dtype != given:
        short, wanted = map(dtype_name, (given, output.dtype))
        raise Refused(f"attention gives {wanted} here, where the operator gives {short}; cast its inputs to {wanted}")


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
    if fake_tensor(site.node) is None or needs_gradients(site.node):
        raise Refused("gradients are needed and the operator has no backward; run under torch.no_grad()")


def _check_scores(site: AttentionSite, unused: set[Node]) -> None:
    if not site.scores <= unused:
        raise Refused("the attention scores or probabilities are used elsewhere; do not return or keep them")


def _gains_by_fusion(query: torch.Tensor) -> bool:
    """Whether SDPA may be faster: on a GPU it is not in float32, unless products may be rounded."""
    return not (query.is_cuda and query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")


def _shows_each_query_a_key(mask: Mask, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the shapes alone say that no query has all its keys hidden, where outputs and gradients differ."""
    if (mask.key_padding, mask.documents, mask.rest) != (sympy.true, None, sympy.true):
        return False
    if mask.window is None:
        return not mask.is_causal or bool(mask.offset.is_nonnegative)
    return mask.offset == 0 and guard_or_false(query.shape[2] <= key.shape[2])


def _is_positive(scale: tuple[Factor, ...] | None) -> bool:
    """Whether a scale is known to be above 0, where SDPA is right with every mask."""
    return scale is None or (len(_known(scale)) == len(scale) and math.prod(_known(scale)) > 0)


def _keeps_gradients(site: AttentionSite) -> bool:
    """Whether gradients flow through all that a site is read from, if they flow into it."""
    nodes = [node for node in {site.node, *site.scores, *site.passed} if is_floating(node)]
    return all(needs_gradients(node) for node in nodes if any(map(needs_gradients, node.all_input_nodes)))


def _check_length(query: torch.Tensor, key: torch.Tensor, config: S2OConfig) -> None:
    if choose_sparse(query.shape[2], key.shape[2], query.device, config) is False:
        raise Refused(why_dense(query.shape[2], key.shape[2], query.device, config))
