"""What calls without masks of tensors come to: whether they are valid, and sparse, is decided once for equal calls.

That follows from shapes, dtypes, devices, numbers and settings. Only calls of plain tensors and numbers that ask for no
derivatives are remembered; of others, and of calls that are refused, everything is checked each time.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from . import dispatch
from .config import S2OConfig
from .surroundings import is_transformed
from .validation import DTYPES
from .visibility import Visibility

_MOST = 4096
"""Outcomes that are kept; then all are found anew, in about 15 microseconds each."""


class Outcome(NamedTuple):
    """The terms of a call, simplified, its settings, whether it is sparse, and whether SDPA answers it as it is."""

    terms: Visibility
    config: S2OConfig
    is_sparse: bool
    is_plain: bool


_found: dict[Hashable, Outcome] = {}


def call_key(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    window: int | None,
    scale: float | None,
    softcap: float,
    settings: tuple[Any, ...],
) -> Hashable | None:
    """What the outcome of a call without tensors of terms depends on; None for calls that are not remembered.

    `settings` are `S2OConfig.values`.
    """
    if not (type(query) is type(key) is type(value) is torch.Tensor) or is_transformed():
        return None
    # The dispatcher converts some numbers of other types that equal these, not all.
    are_of_the_schema = (
        type(softcap) is float
        and (scale is None or type(scale) is float)
        and type(is_causal) is bool
        and type(causal_offset) is int
        and (window is None or type(window) is int)
    )
    if not are_of_the_schema or not (query.is_cuda or query.is_cpu):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    device, dtype = query.device, query.dtype
    if dtype not in DTYPES:
        return None
    limits = dispatch.break_even(device, dtype) if settings[1] is None else None
    of_tensors = query.shape, key.shape, value.shape, dtype, key.dtype, value.dtype, device, key.device, value.device
    return *of_tensors, is_causal, causal_offset, window, scale, softcap, settings, limits


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
