"""The scale and the soft cap of an attention site as numbers, as far as they are known while compiling."""

from __future__ import annotations

import math

from .graph.node_values import constant
from .match.site import AttentionSite
from .match.walk import Factor


def known_product(factors: tuple[Factor, ...]) -> float:
    """The product of the factors that are known while compiling."""
    return math.prod(_known(factors))


def are_known(factors: tuple[Factor, ...]) -> bool:
    """Whether all factors are known while compiling."""
    return len(_known(factors)) == len(factors)


def softcap_of(factors: tuple[Factor, ...]) -> float:
    """The c of ``c * tanh(logits / c)``, whose factors are known."""
    return abs(known_product(factors))


def logit_terms_in_words(site: AttentionSite) -> list[str]:
    """The terms of the logits besides scale and masks, in words."""
    capped = [] if site.softcap is None else [f"soft cap {softcap_of(site.softcap):g}"]
    return capped + ["sinks"] * (site.sinks is not None)


def _known(factors: tuple[Factor, ...]) -> list[float]:
    numbers = (Factor(constant(factor.value), factor.inverted).number for factor in factors)
    return [number for number in numbers if number is not None]
