"""Sparse or dense: chosen on the host, by shape and device alone, without a synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .break_even import BreakEven, break_even
from .config import S2OConfig
from .sizes import statically_known_true
from .visibility import Visibility
from .work import Size, Work, work_of

DENSE_AT_ANY_LENGTH = 2**62
"""A `min_length` that no call reaches."""

_FORCE = "min_length=0 asks for sparse attention at any length"


def has_kernels(visibility: Visibility, config: S2OConfig) -> bool:
    """Whether Triton kernels follow a call's rule; the "gain" rule and block means, which measured worse, have none."""
    # Where queries see different keys, none are means (`Visibility.effective_config`).
    return config.ranking.rule != "gain" and (visibility.rows_differ or not config.has_means)


def choose_sparse(
    query: Sequence[Size],
    key: Sequence[Size],
    value: Sequence[Size],
    terms: Visibility,
    device: torch.device,
    dtype: torch.dtype,
    config: S2OConfig,
) -> bool | None:
    """Whether a call is worth the sparse path: enough work, and more queries than would be attended densely anyway.

    `min_length` says instead how many keys are enough; 0 always takes the sparse path.

    Args:
        query: The shape [B, Hq, Lq, D].
        key: The shape [B, Hkv, Lk, D].
        value: The shape [B, Hkv, Lk, Dv].
        terms: The mask, of which the causal one and the window count; ``Visibility()`` where nothing is known of it,
            which never refuses what could be sparse.
        device: Of the call.
        dtype: The same.
        config: Its settings.

    Returns:
        None where sizes are symbolic and the answer depends on them.
    """
    if config.min_length == 0:
        return True
    has_rows = _exceeds(query[2], dense_queries(config))
    if has_rows is False:
        return False
    if config.min_length is None:
        is_enough = _is_enough(work_of(query, key, value, terms), _wanted(query, value, device, dtype))
    elif config.min_length >= DENSE_AT_ANY_LENGTH:
        is_enough = False
    else:
        is_enough = _exceeds(key[2], config.min_length - 1)
    return False if is_enough is False else is_enough and has_rows


def why_dense(
    query: Sequence[Size],
    key: Sequence[Size],
    value: Sequence[Size],
    terms: Visibility | None,
    device: torch.device,
    dtype: torch.dtype,
    config: S2OConfig,
) -> str:
    """Why `choose_sparse`, asked the same, is false, and what to do about it; `terms` are None if nothing is known."""
    has_rows = _exceeds(query[2], dense_queries(config))
    if config.min_length is not None and has_rows is not False:
        return f"{key[2]} keys are fewer than min_length={config.min_length}; a lower one asks for sparse attention"
    wanted = _wanted(query, value, device, dtype)
    if has_rows is False or (terms is None and not wanted.is_never):
        return f"{query[2]} queries over {key[2]} keys are too few to gain; {_FORCE}"
    _, most = work_of(query, key, value, terms or Visibility())
    return f"{_why_too_little(most, wanted)}; {_FORCE}"


def dense_queries(config: S2OConfig) -> int:
    """How many queries are attended densely in any call."""
    return max(config.last_queries, config.ranking.segment)


def _exceeds(size: Size, limit: int) -> bool | None:
    if statically_known_true(size > limit):
        return True
    return False if statically_known_true(size <= limit) else None


def _wanted(query: Sequence[Size], value: Sequence[Size], device: torch.device, dtype: torch.dtype) -> BreakEven:
    """What a call of these shapes must have."""
    widest = query[3] if statically_known_true(query[3] >= value[3]) else value[3]
    return break_even(device, dtype).for_channels(device, widest)


def _is_enough(range_of_work: tuple[Work, Work], wanted: BreakEven) -> bool | None:
    """Whether calls whose work is between two are worth the sparse path."""
    least, most = range_of_work
    if least.multiply_adds >= wanted.work and least.keys >= wanted.keys:
        return True
    return None if most.multiply_adds >= wanted.work and most.keys >= wanted.keys else False


def _why_too_little(most: Work, wanted: BreakEven) -> str:
    if wanted.is_never:
        return f"sparse attention was slower at any length ({wanted.source})"
    if most.keys < wanted.keys:
        seen = f"{most.keys:,.0f} on average, and sparse attention pays from {wanted.keys:,.0f} on ({wanted.source})"
        return f"a query sees too few keys to gain, {seen}, which longer prompts or windows reach"
    done = (
        f"{most.multiply_adds:.1e} multiply-adds, and sparse attention pays from {wanted.work:.1e} on ({wanted.source})"
    )
    return f"the call is too little work to gain, {done}, which longer prompts or more of them at once reach"
