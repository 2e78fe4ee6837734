"""Which requests of a batch run sparse, and which neighbours go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...ops import S2OConfig
from ...ops.dispatch import choose_sparse, dense_queries
from ...ops.requests import visibility_of


class Run(NamedTuple):
    """Neighbouring requests that all run sparse, or all dense; `tokens` are their queries."""

    requests: slice
    tokens: slice
    is_sparse: bool


def pages_in_window(
    queries: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, left: int, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and pages of requests from the first page on that a query sees: vLLM gives earlier ones to others.

    Args:
        queries: [N], how many each request has, on the host.
        keys: [N], the same.
        table: [N, M], the pages of each request.
        left: How many keys before its own a query sees; -1 for all.
        size: Keys of a page.

    Returns:
        `keys` less those of earlier pages, and the table of the others, whose rows end in the last page again.
    """
    if left < 0:
        return keys, table
    skipped = (keys - queries - left).clamp_min(0) // size
    columns = (torch.arange(table.shape[1]) + skipped[:, None]).clamp_max(table.shape[1] - 1)
    return keys - skipped * size, table.gather(1, columns.to(table.device))


class Layer(NamedTuple):
    """What the choice depends on besides lengths; `window_size` as of ``s2o_compile.attention_varlen``."""

    heads: int
    kv_heads: int
    width: int
    window_size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    config: S2OConfig

    def is_sparse(self, queries: int, keys: int) -> bool:
        """Whether a request is worth the sparse path; no request that decodes is, whatever `min_length` says."""
        if queries <= dense_queries(self.config):
            return False
        shapes = ((1, heads, length, self.width) for heads, length in ((self.heads, queries), (self.kv_heads, keys)))
        query, key = shapes
        terms = visibility_of(queries, keys, self.window_size).simplified(queries, keys)
        return bool(choose_sparse(query, key, key, terms, self.device, self.dtype, self.config))

    def runs(self, starts: Sequence[int], keys: Sequence[int]) -> list[Run]:
        """The requests of a batch in runs; those without queries, which pad a batch, start none.

        Args:
            starts: [N + 1], where the queries of each request start, and those of the last end.
            keys: [N], how many keys each request has.
        """
        runs: list[Run] = []
        for number, count in enumerate(keys):
            first, end = starts[number], starts[number + 1]
            if first == end:
                continue
            is_sparse = self.is_sparse(end - first, count)
            if runs and runs[-1].is_sparse == is_sparse:
                before = runs.pop()
                first, number_of_first = before.tokens.start, before.requests.start
            else:
                number_of_first = number
            runs.append(Run(slice(number_of_first, number + 1), slice(first, end), is_sparse))
        return runs
