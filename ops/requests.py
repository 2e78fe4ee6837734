"""The requests of a call that packs many of them: where the queries and the keys of each are, known on the host."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .visibility import Visibility

NO_BOUND = 2**30
"""Farther than any key from a query."""


class Request(NamedTuple):
    """A request of a packed call.

    Attributes:
        number: Its place among the requests, and its row of a block table.
        rows: Its queries among all that are packed.
        keys: Its keys among all that are packed; where they are paged, among its own, from 0 on.
    """

    number: int
    rows: slice
    keys: slice

    @property
    def query_count(self) -> int:
        """How many queries it has."""
        return int(self.rows.stop - self.rows.start)

    @property
    def key_count(self) -> int:
        """How many keys it has."""
        return int(self.keys.stop - self.keys.start)


def read_requests(
    cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor | None, seqused_k: torch.Tensor | None, paged: bool
) -> list[Request]:
    """All requests, empty ones too; waits once for a device if any of the tensors is there.

    Args:
        cu_seq_q: [N + 1], where the queries of each request start, and where those of the last end.
        cu_seq_k: [N + 1], the same of packed keys; not looked at where they are paged.
        seqused_k: [N], how many of its keys a request attends to, the first ones; None for all that are packed.
        paged: Whether keys are in pages.

    Raises:
        ValueError: Lengths are negative, or a request has more keys than are packed for it.
    """
    starts_of_keys = None if paged else cu_seq_k
    query_starts, key_starts, used = on_host(cu_seq_q, starts_of_keys, seqused_k)
    assert query_starts is not None
    _check_starts("cu_seq_q", query_starts)
    requests = []
    if key_starts is not None:
        _check_starts("cu_seq_k", key_starts)
    for number, (first, end) in enumerate(itertools.pairwise(query_starts)):
        start = 0 if key_starts is None else key_starts[number]
        count = key_starts[number + 1] - start if key_starts is not None else 0
        if used is not None:
            _check_used(number, used[number], None if key_starts is None else count)
            count = used[number]
        requests.append(Request(number, slice(first, end), slice(start, start + count)))
    return requests


def on_host(*tensors: torch.Tensor | None) -> list[list[int] | None]:
    """The numbers in tensors of one dimension, those that are on a device by a single copy."""
    away = [x for x in tensors if x is not None and x.device.type != "cpu"]
    numbers = torch.cat([x.long() for x in away]).tolist() if away else []
    found: list[list[int] | None] = []
    for tensor in tensors:
        if tensor is None:
            found.append(None)
        elif tensor.device.type == "cpu":
            found.append(tensor.tolist())
        else:
            found.append(numbers[: len(tensor)])
            numbers = numbers[len(tensor) :]
    return found


def _check_starts(name: str, starts: list[int]) -> None:
    if starts[0] != 0:
        raise ValueError(f"{name} must start with 0, not {starts[0]}")
    for number, (first, end) in enumerate(itertools.pairwise(starts)):
        if end < first:
            raise ValueError(f"{name} must not decrease, but falls from {first} to {end} after request {number}")


def _check_used(number: int, used: int, most: int | None) -> None:
    if used < 0:
        raise ValueError(f"seqused_k must be at least 0, not {used} for request {number}")
    if most is not None and used > most:
        raise ValueError(f"seqused_k must be at most the keys packed for request {number} ({most}), not {used}")


def check_room(requests: list[Request], queries: int, keys: int, max_q: int, max_k: int) -> None:
    """Check requests against the sizes of the tensors that hold them.

    Args:
        requests: All requests of a call.
        queries: How many queries are packed.
        keys: How many keys are packed, or have room in the pages of one request.
        max_q: The most queries of a request, as the caller says.
        max_k: The most keys of a request, as the caller says.

    Raises:
        ValueError: A request lies outside of the tensors, or is longer than the caller says.
    """
    for request in requests:
        if request.rows.stop > queries:
            raise ValueError(f"cu_seq_q must end within the rows of query ({queries}), not at {request.rows.stop}")
        if request.keys.stop > keys:
            raise ValueError(
                f"request {request.number} must have its keys within those that are packed, or that its row of "
                f"block_table has room for ({keys}), not up to {request.keys.stop}"
            )
        for name, most, count in (("max_q", max_q, request.query_count), ("max_k", max_k, request.key_count)):
            if count > most:
                raise ValueError(f"{name} must be at least what request {request.number} has ({count}), not {most}")


def bounded(window_size: Sequence[int]) -> tuple[int, int]:
    """(left, right) that shows the same keys, in the 32 bits that kernels and FlashAttention have for each."""
    left, right = window_size
    return min(left, NO_BOUND), min(right, NO_BOUND)


def visibility_of(queries: int, keys: int, window_size: Sequence[int]) -> Visibility:
    """What (left, right) lets queries see that stand at the last keys; -1 bounds nothing on its side."""
    left, right = window_size
    # The key that is `right` after the own one counts as the last of a causal mask and of a window.
    ahead = max(right, 0)
    window = None if left < 0 else left + ahead + 1
    return Visibility(right >= 0, keys - queries + ahead, window=window)
