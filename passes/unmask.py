"""Checks whether attention that stays dense loses its mask: the operator, run dense, attends what it shows without it.

The mask, which takes as much memory as queries times keys, is then not computed either, unless others use it.
"""

from __future__ import annotations

import sympy

from ..ops.config import S2OConfig
from ..ops.dense import attends_by_kernel, is_large
from ..ops.dispatch import DENSE_AT_ANY_LENGTH
from .accept import check_call, check_inputs, proven_mask
from .fuse import gains_by_fusion
from .mask.prover import Prover
from .mask.refused import Refused
from .mask.terms import Mask
from .match.site import AttentionSite

DENSE = S2OConfig(min_length=DENSE_AT_ANY_LENGTH)
"""The operator's settings where a site stays dense."""


def mask_to_drop(site: AttentionSite, prover: Prover) -> Mask:
    """The proven mask of a site that is faster without it.

    Raises:
        Refused: It is not, or the mask is not proven as a whole.
    """
    query, key = check_inputs(site)
    check_call(site)
    if site.mask_mod is not None:
        raise Refused("FlexAttention skips what its mask hides")
    if not site.masks and not site.scores:
        raise Refused("there is no mask")
    if not is_large(query, key):
        raise Refused("the mask is small")
    if site.scores and not gains_by_fusion(query):
        raise Refused("SDPA is not faster")
    if (site.softcap is not None or site.sinks is not None) and not attends_by_kernel(query):
        raise Refused("SDPA has no soft cap and no sinks")
    mask = proven_mask(site, prover)
    if mask.rest != sympy.true:
        raise Refused("a part of the mask is not proven")
    return mask
