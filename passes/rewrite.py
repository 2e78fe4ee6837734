"""Decides which attention sites become ``torch.ops.s2o.attention``, rewrites them, and records each decision."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from ..ops.config import S2OConfig
from ..ops.dense import is_large
from ..ops.layout import Sharding
from .accept import check_call, check_inputs, check_length, check_scores, proven_mask
from .fuse import fuse
from .graph.metadata import as_computed, note_values
from .graph.mutation import Writes
from .graph.nested import nested_graphs
from .graph.torch_internals import is_erased
from .logit_terms import logit_terms_in_words
from .mask.prover import Prover
from .mask.refused import Refused
from .mask.terms import Mask
from .match.decompose import decompose
from .match.find import find_attention
from .match.site import AttentionSite
from .match.walk import Walker
from .over_ranks import ShardedSiteError, has_dtensors, mask_of_sequence
from .replace import Replacer
from .report import Decision, site_name, source_location
from .unmask import DENSE, mask_to_drop


def rewrite(
    module: GraphModule,
    config: S2OConfig,
    of_site: Callable[[str], S2OConfig] | None = None,
    fuse_dense: bool = False,
    sharding: Sharding | None = None,
) -> list[Decision]:
    """Replace every attention site that can be proven safe, in place; the rest of the graph stays as it is.

    The graphs that it calls are rewritten too, without knowledge of the values that they are called with.

    Args:
        module: The graph that Dynamo hands to a backend.
        config: The settings of the operator.
        of_site: The settings of a site by name, by default `config`; raises `Refused` for one that is to stay dense.
        fuse_dense: Whether attention that stays dense loses its mask where that is proven, and becomes a call of SDPA
            where it is written out and is proven to be one.
        sharding: Where the sequence is sharded over ranks: sites become ``torch.ops.s2o.attention_context``, of any
            length, but for those of DTensors.

    Returns:
        One decision per site. The node of a rewritten site has its decision in ``meta["s2o_decision"]``.

    Raises:
        ShardedSiteError: There is a `sharding`, and a site cannot follow it.
    """
    chosen = of_site or (lambda name: config)
    return [
        decision
        for graph in nested_graphs(module)
        for decision in _rewrite_graph(graph, config, chosen, fuse_dense, sharding)
    ]


def _rewrite_graph(
    module: GraphModule,
    config: S2OConfig,
    of_site: Callable[[str], S2OConfig],
    fuse_dense: bool,
    sharding: Sharding | None,
) -> list[Decision]:
    """Rewrite the sites of one graph, and not those of the graphs that it calls."""
    found = set(module.graph.nodes)
    with as_computed(module.graph) as out_of_place:
        rewriter = _Rewriter(module.graph, config, of_site, fuse_dense, sharding)
        decisions = [decision for node in list(module.graph.nodes) for decision in rewriter.visit(node)]
    if rewriter.replacer.changed:
        note_values(node for node in module.graph.nodes if node not in found)
        module.graph.lint()
        module.recompile()
    else:
        out_of_place.undo()
    return decisions


class _Rewriter:
    """Rewrites the sites of one graph."""

    def __init__(
        self,
        graph: Graph,
        config: S2OConfig,
        of_site: Callable[[str], S2OConfig],
        fuse_dense: bool,
        sharding: Sharding | None,
    ) -> None:
        self.config, self.of_site, self.fuse_dense, self.sharding = config, of_site, fuse_dense, sharding
        self.writes = Writes(graph.nodes)
        self.prover = Prover(self.writes)
        self.walker = Walker(self.writes, self.prover.reader)
        self.replacer = Replacer(graph, self.writes, self.prover.reader)

    def visit(self, node: Node) -> list[Decision]:
        """Rewrite each attention site that a node computes or leave it; the decisions."""
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
        """Rewrite the attention site whose output a node is or leave it; the decision, none if there is no site."""
        site = None if is_erased(node) else find_attention(self.walker, node)
        if site is None:
            return []
        decision = self.decide(site)
        if fuse_dense and not decision.rewritten:
            decision.unmasked = self.drop_mask(site)
            if not decision.unmasked:
                fuse(site, self.prover, self.writes, self.replacer)
        return [decision]

    def decide(self, site: AttentionSite) -> Decision:
        """Rewrite one site or leave it; the decision."""
        if self.sharding is not None and not has_dtensors(site):
            return self.shard(site, self.sharding)
        decision = _undecided(site)
        try:
            mask, by_length = self.accept(site)
            node = self.replace(site, mask, decision.name, self.of_site(decision.name))
        except Refused as refused:
            decision.reason = str(refused)
            return decision
        _note(decision, node, site, mask)
        decision.by_length = by_length
        proven = "the mask is proven" if mask.rest == sympy.true else "what is not proven of the mask is passed on"
        decision.reason = f"{proven} and the call may be long enough for sparse attention"
        return decision

    def shard(self, site: AttentionSite, sharding: Sharding) -> Decision:
        """Let one site attend to the keys of all ranks; the decision.

        Raises:
            ShardedSiteError: It cannot.
        """
        decision = _undecided(site)
        try:
            check_inputs(site)
            check_call(site)
            mask = mask_of_sequence(proven_mask(site, self.prover), site)
            node = self.replace(site, mask, decision.name, self.config_or_dense(decision.name), sharding)
        except Refused as refused:
            place = f"{decision.name} ({decision.location})"
            raise ShardedSiteError(
                f"attention site {place} cannot attend to the keys of all ranks: {refused}"
            ) from None
        _note(decision, node, site, mask)
        decision.reason = "the keys of all ranks are gathered, and it is sparse if these are enough"
        return decision

    def config_or_dense(self, name: str) -> S2OConfig:
        """The settings of a site by name."""
        try:
            return self.of_site(name)
        except Refused:
            return DENSE

    def accept(self, site: AttentionSite) -> tuple[Mask, bool]:
        """The proven mask of a site that can become the operator, and whether that is sparse at some lengths alone.

        Raises:
            Refused: It cannot.
        """
        query, key = check_inputs(site)
        check_call(site)
        if not is_large(query, key):  # Else the mask is read in any case.
            check_length(site, self.config)
        mask = proven_mask(site, self.prover)
        return mask, not check_length(site, self.config, mask)

    def drop_mask(self, site: AttentionSite) -> bool:
        """Let a site that stays dense attend what its mask shows without the mask; whether that is possible."""
        try:
            self.replace(site, mask_to_drop(site, self.prover), "", DENSE)
        except Refused:
            return False
        return True

    def replace(
        self, site: AttentionSite, mask: Mask, name: str, config: S2OConfig, sharding: Sharding | None = None
    ) -> Node:
        """Put the operator where a site is, and remove the nodes that nothing uses then; its node.

        Raises:
            Refused: The operator cannot compute the same; the site is as it was.
        """
        unused = self.replacer.unused_without(site)
        check_scores(site, unused)
        with self.replacer.inserting_before(site.node):
            arguments = self.replacer.arguments.of_operator(mask, site) | {"site": name, **config.arguments()}
            operator = torch.ops.s2o.attention.default
            if sharding is not None:
                operator, arguments = torch.ops.s2o.attention_context.default, arguments | sharding._asdict()
            node = self.replacer.put(operator, arguments, site, mask)
        self.replacer.erase(unused)
        return node


def _note(decision: Decision, node: Node, site: AttentionSite, mask: Mask) -> None:
    """Record that a site became the operator at a node."""
    node.meta["s2o_decision"] = decision
    decision.rewritten, decision.mask = True, "; ".join([str(mask), *logit_terms_in_words(site)])


def _undecided(site: AttentionSite) -> Decision:
    """The decision on a site before it is made."""
    tensors = {"query": site.query, "key": site.key, "value": site.value}
    return Decision(
        name=site_name(site.node),
        location=source_location(site.node),
        shapes={name: _shape(item.tensor) for name, item in tensors.items()},
        rewritten=False,
        reason="",
    )


def _shape(tensor: torch.Tensor | None) -> tuple[int | str, ...]:
    return () if tensor is None else tuple(size if isinstance(size, int) else str(size) for size in tensor.shape)
