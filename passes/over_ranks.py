"""Attention sites of models whose sequence is sharded over ranks.

Their masks are written in the positions of one rank, as if it held all, and mean those of the sequence.
"""

from __future__ import annotations

from dataclasses import replace

import sympy
from sympy.core.function import AppliedUndef

from ..ops.distributed import is_dtensor
from .graph.node_values import objects
from .graph.torch_internals import guard_or_false
from .mask.empty_rows import EmptyRows
from .mask.expressions import KEY
from .mask.refused import Refused
from .mask.terms import Mask
from .match.site import AttentionSite


class ShardedSiteError(ValueError):
    """An attention site cannot attend to the keys of all ranks, and would attend to those of its own alone."""


def mask_of_sequence(mask: Mask, site: AttentionSite) -> Mask:
    """What the mask of a site says of the whole sequence; queries that see none of its keys get zeros.

    Raises:
        Refused: It does not say that in terms that hold wherever a rank's positions are.
    """
    query, key = site.query_and_key
    if not guard_or_false(query.shape[2] == key.shape[2]):
        raise Refused(f"it has {query.shape[2]} queries and {key.shape[2]} keys; run a prefill without a longer cache")
    if mask.documents is not None:
        raise Refused(
            "its mask tells documents apart, by numbers that each rank counts anew; transformers sees documents where "
            "position_ids jump unless it is given an attention_mask, such as one of ones"
        )
    if mask.rest != sympy.true or not isinstance(mask.offset, sympy.Integer) or _has_places(mask.key_padding):
        raise Refused(f"its mask is more than a causal one, a window and padding: {mask}")
    return replace(mask, empty_rows=EmptyRows.ZEROS)


def has_dtensors(site: AttentionSite) -> bool:
    """Whether a site attends DTensors, whose ranks torch takes care of."""
    return any(is_dtensor(x) for item in (site.query, site.key, site.value) for x in objects(item.node))


def _has_places(padding: sympy.Basic) -> bool:
    """Whether a predicate depends on where a key is, and not only on what a tensor says of it."""
    of_tensors = {function: sympy.Dummy() for function in padding.atoms(AppliedUndef)}
    return KEY in padding.xreplace(of_tensors).free_symbols
