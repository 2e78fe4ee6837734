"""Keys and values of requests, packed or in pages of any strides, brought together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .requests import Request


def gathered(pool: torch.Tensor, table: torch.Tensor | None, requests: Sequence[Request]) -> torch.Tensor:
    """The keys or values of some requests, one request after the other [sum of their keys, Hkv, D].

    A view where they lie together already. What pages hold beyond a request's keys is not in it, and pages that none of
    them uses are not read.

    Args:
        pool: Packed [T, Hkv, D] without a `table`, pages [blocks, block size, Hkv, D] with one.
        table: [N, M], the pages of each request in the order of its keys; entries beyond these are not looked at.
        requests: At least one.
    """
    if table is None:
        return joined(pool, [request.keys for request in requests])
    size = pool.shape[1]
    counts = [_pages(request, size) for request in requests]
    pages = [table[request.number, :count] for request, count in zip(requests, counts, strict=True)]
    slots = pool.index_select(0, pages[0] if len(pages) == 1 else torch.cat(pages)).flatten(0, 1)
    parts, start = [], 0
    for request, count in zip(requests, counts, strict=True):
        parts.append(slice(start, start + request.key_count))
        start += count * size
    return joined(slots, parts)


def start_gathering(
    pool: torch.Tensor, table: torch.Tensor, request: Request
) -> tuple[torch.Tensor, Callable[[], Any]]:
    """`gathered` for one request on a GPU, by few programs beside what the current stream goes on with.

    What follows a call of the function that is returned with it waits for it. Call it before the memory is free again.
    """
    from .kernels.gather import gather

    current = torch.cuda.current_stream(pool.device)
    beside = _beside(pool.device, current.cuda_stream)
    pages = table[request.number, : _pages(request, pool.shape[1])]
    rows = pool.new_empty(request.key_count, *pool.shape[2:])
    beside.wait_stream(current)
    with torch.cuda.stream(beside):
        gather(rows, pool, pages, request.query_count)
    done = beside.record_event()
    return rows, lambda: current.wait_event(done)


@functools.lru_cache(maxsize=16)
def _beside(device: torch.device, stream: int) -> torch.cuda.Stream:
    """The stream on which `start_gathering` gathers for a current one, which may be captured while others go on."""
    return torch.cuda.Stream(device)


def joined(x: torch.Tensor, parts: Sequence[slice]) -> torch.Tensor:
    """Rows of a tensor, part after part; a view where each part starts where the one before it ends."""
    runs = merged(parts)
    return x[runs[0]] if len(runs) == 1 else torch.cat([x[run] for run in runs])


def merged(parts: Sequence[slice]) -> list[slice]:
    """The same rows in fewer parts, neighbours as one."""
    runs: list[slice] = []
    for part in parts:
        if runs and runs[-1].stop == part.start:
            runs[-1] = slice(runs[-1].start, part.stop)
        else:
            runs.append(part)
    return runs


def check_pages(table: torch.Tensor, requests: Sequence[Request], blocks: int, size: int) -> None:
    """Check the entries of a block table on the host that requests use.

    Raises:
        ValueError: One is no page.
    """
    for number, used in ((request.number, table[request.number, : _pages(request, size)]) for request in requests):
        wrong = used[(used < 0) | (used >= blocks)]
        if len(wrong):
            raise ValueError(
                f"block_table must name pages of key (0 to {blocks - 1}), not {int(wrong[0])} for request {number}"
            )


def _pages(request: Request, size: int) -> int:
    """How many pages of `size` keys a request uses."""
    return -(-request.key_count // size)
