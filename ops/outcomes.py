"""What calls without masks of tensors come to: whether they are valid, and sparse, is decided once for equal calls.

That follows from shapes, dtypes, devices, numbers and settings. Only calls of plain tensors and numbers that ask for no
derivatives are remembered; of others, and of calls that are refused, everything is checked each time.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from . import dispatch
from .config import S2OConfig
from .surroundings import is_transformed
from .validation import DTYPES
from .visibility import Visibility

_THRESHOLD = S2OConfig().threshold
_MOST = 4096
"""Outcomes that are kept; then all are found anew, in about 15 microseconds each."""


class Outcome(NamedTuple):
    """The terms of a call, simplified, its settings, and whether it is sparse."""

    terms: Visibility
    config: S2OConfig
    is_sparse: bool


_found: dict[Hashable, Outcome] = {}


def call_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Visibility,
    scale: float | None,
    softcap: float,
    settings: Mapping[str, Any],
) -> Hashable | None:
    """What the outcome of a call depends on; None for calls that are not remembered."""
    if not (type(query) is type(key) is type(value) is torch.Tensor) or not terms.is_positional or is_transformed():
        return None
    if not _are_of_the_schema(terms, scale, softcap):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    device, dtype = query.device, query.dtype
    if device.type not in ("cuda", "cpu") or dtype not in DTYPES:
        return None
    given, min_length = settings.get, settings.get("min_length")
    limits = dispatch.break_even(device, dtype) if min_length is None else None
    of_tensors = query.shape, key.shape, value.shape, dtype, key.dtype, value.dtype, device, key.device, value.device
    # The dispatcher leaves out what is as in the schema.
    of_settings = given("threshold", _THRESHOLD), min_length, given("last_queries", 0), given("settings", "")
    return *of_tensors, terms, scale, softcap, *of_settings, limits


def _are_of_the_schema(terms: Visibility, scale: float | None, softcap: float) -> bool:
    """Whether numbers have the types of the schema: the dispatcher converts some others that equal them, not all."""
    return (
        type(softcap) is float
        and (scale is None or type(scale) is float)
        and type(terms.is_causal) is bool
        and type(terms.causal_offset) is int
        and (terms.window is None or type(terms.window) is int)
    )


def remembered(call: Hashable | None) -> Outcome | None:
    """The outcome of a call that was valid before."""
    try:
        return None if call is None else _found.get(call)
    except TypeError:  # A size is symbolic, which cannot be hashed.
        return None


def remember(call: Hashable, outcome: Outcome) -> None:
    """Keep the outcome of a valid call."""
    if len(_found) >= _MOST:
        _found.clear()
    with suppress(TypeError):  # As above.
        _found[call] = outcome
