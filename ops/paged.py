"""Keys and values of requests, packed or in pages of any strides: brought together, or found where they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .places import Places
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


def placed(
    key: torch.Tensor, value: torch.Tensor, table: torch.Tensor, request: Request
) -> tuple[torch.Tensor, torch.Tensor, Places] | None:
    """Keys and values of a request [Lk, Hkv, D] as `Places` has them, nothing copied.

    None where pages have no whole number of rows between them, or not the same one in both pools of `gathered`; where
    channels do not lie side by side; and where pages are read so often that there are fewer rows than keys.
    """
    blocks, size = key.shape[:2]
    steps = [_rows_of_page(pool) for pool in (key, value)]
    total = (blocks - 1) * steps[0] + size
    if not steps[0] or steps[0] != steps[1] or not request.key_count <= total < 2**31:
        return None
    pages = table[request.number, : _pages(request, size)]
    firsts = torch.arange(0, total - size + 1, steps[0], dtype=torch.int32, device=table.device)
    slots = torch.arange(size, dtype=torch.int32, device=table.device)
    # Selecting stops at what is no page, on a GPU too.
    rows = (firsts.index_select(0, pages)[:, None] + slots).flatten()[: request.key_count]
    key, value = (pool.as_strided((request.key_count, *pool.shape[2:]), pool.stride()[1:]) for pool in (key, value))
    return key, value, Places(rows, total)


def _rows_of_page(pool: torch.Tensor) -> int:
    """How many rows lie from the start of one page to that of the next; 0 where there is no such number."""
    of_page, of_row, _, of_channel = pool.stride()
    if of_channel != 1 or 0 in pool.shape or of_row <= 0 or of_page % of_row:
        return 0
    return of_page // of_row


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
