"""Replaces attention that stays dense by a call of SDPA, where that is proven to compute the same, with gradients too.

That is attention that is written out, and SDPA whose mask is the causal one, or none.
"""

from __future__ import annotations

from contextlib import suppress

import torch
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from .accept import check_inputs, check_scores, proven_mask
from .arguments import is_of_sdpa
from .graph.mutation import Writes
from .graph.node_values import constant, is_floating, needs_gradients
from .logit_terms import are_known, known_product
from .mask.empty_rows import EmptyRows
from .mask.prover import Prover
from .mask.refused import Refused
from .mask.terms import Mask
from .match.site import AttentionSite
from .match.walk import Factor
from .replace import Replacer


def fuse(site: AttentionSite, prover: Prover, writes: Writes, replacer: Replacer) -> None:
    """Put SDPA where a site is, if that is faster and computes the same; else leave it."""
    with suppress(Refused), replacer.inserting_before(site.node):
        mask = _accept(site, prover, writes)
        unused = replacer.unused_without(site)
        check_scores(site, unused)
        arguments = replacer.arguments.of_sdpa(mask, site)
        replacer.put(scaled_dot_product_attention, arguments, site, mask)
        replacer.erase(unused)


def _accept(site: AttentionSite, prover: Prover, writes: Writes) -> Mask:
    """The proven mask of a site, if SDPA computes the same with the same gradients, and faster."""
    query, key = check_inputs(site)
    if site.softcap is not None or site.sinks is not None or not _is_positive(site.scale):
        raise Refused("this is not what SDPA computes")
    if not site.scores:
        return _mask_of_sdpa(site, prover)
    if not gains_by_fusion(query):
        raise Refused("SDPA is not faster")
    if needs_gradients(site.node) and writes.to(site.node):
        raise Refused("SDPA keeps its output for the gradients, and it is changed in place")
    mask = proven_mask(site, prover)
    if mask.empty_rows is EmptyRows.UNMASKED:
        raise Refused("SDPA gives other values to queries that see no key")
    if not _keeps_gradients(site) or (needs_gradients(site.node) and not mask.shows_each_query_a_key(query, key)):
        raise Refused("SDPA has other gradients")
    return mask


def _mask_of_sdpa(site: AttentionSite, prover: Prover) -> Mask:
    """The proven mask of a call of SDPA that would be the same, and faster, without its mask tensor."""
    if not site.masks or constant(site.dropout_p) != 0 or isinstance(site.is_causal, Node):
        raise Refused("SDPA is what it was")
    mask = proven_mask(site, prover)
    if not is_of_sdpa(mask):
        raise Refused("SDPA needs the mask")
    return mask


def _is_positive(scale: tuple[Factor, ...] | None) -> bool:
    """Whether a scale is known to be above 0, where SDPA is right with every mask."""
    return scale is None or (are_known(scale) and known_product(scale) > 0)


def gains_by_fusion(query: torch.Tensor) -> bool:
    """Whether SDPA may be faster: on a GPU it is not in float32, unless products may be rounded."""
    return not (query.is_cuda and query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest")


def _keeps_gradients(site: AttentionSite) -> bool:
    """Whether gradients flow through all that a site is read from, if they flow into it."""
    nodes = [node for node in {site.node, *site.scores, *site.passed} if is_floating(node)]
    return all(needs_gradients(node) for node in nodes if any(map(needs_gradients, node.all_input_nodes)))
