"""The keys that a query sees: all terms of a call's mask in one value."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

import torch

from .config import S2OConfig
from .sizes import statically_known_true


class Visibility(NamedTuple):
    """The terms of a mask; a query sees a key where all of them allow it. Shapes as in `ops.operator`.

    The order of the fields is that of the arguments of the inner operators. `mask` has 4 dimensions.
    """

    is_causal: bool = False
    causal_offset: int = 0
    key_padding: torch.Tensor | None = None
    window: int | None = None
    query_documents: torch.Tensor | None = None
    key_documents: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there are no terms, so that every query sees every key."""
        return not self.is_causal and all(term is None for term in self[2:])

    @property
    def is_positional(self) -> bool:
        """Whether where a query and a key are decides whether the one sees the other."""
        return self.key_padding is None and self.query_documents is None and self.mask is None

    @property
    def is_plain(self) -> bool:
        """Whether there are no terms but the causal one."""
        return self.window is None and self.is_positional

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """The terms that are tensors, in their order."""
        return self.key_padding, self.query_documents, self.key_documents, self.mask

    def with_tensors(
        self,
        key_padding: torch.Tensor | None,
        query_documents: torch.Tensor | None,
        key_documents: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> Visibility:
        """The same with other `tensors`."""
        return Visibility(
            self.is_causal, self.causal_offset, key_padding, self.window, query_documents, key_documents, mask
        )

    @property
    def rows_differ(self) -> bool:
        """Whether the queries of a segment may see different keys of their history."""
        return self.window is not None or self.query_documents is not None or self.mask is not None

    def simplified(self, queries: int, keys: int) -> Visibility:
        """The same without a causal mask or a window that hide nothing at these lengths."""
        terms = self
        if terms.is_causal and statically_known_true(terms.causal_offset >= keys - 1):
            # The offset still places the dense spans, and the window.
            terms = terms._replace(is_causal=False)
        if terms.window is not None and statically_known_true(queries + terms.causal_offset <= terms.window):
            terms = terms._replace(window=None)
        return terms

    def seen(
        self, batch: torch.Tensor | int, head: torch.Tensor | int, row: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        """The keys that are seen, boolean: indices of batch entries, query heads, queries and keys, broadcast together.

        Indices on which no term depends are not broadcast.
        """
        terms = []
        if self.is_causal:
            terms.append(key <= row + self.causal_offset)
        if self.window is not None:
            terms.append(key > row + (self.causal_offset - self.window))
        if self.key_padding is not None:
            terms.append(self.key_padding[batch, key])
        if self.query_documents is not None and self.key_documents is not None:
            terms.append(self.query_documents[batch, row] == self.key_documents[batch, key])
        if self.mask is not None:
            sizes = self.mask.shape
            index = zip((batch, head, row, key), sizes, strict=True)
            terms.append(self.mask[tuple(0 if size == 1 else place for place, size in index)])
        return functools.reduce(operator.and_, terms) if terms else torch.ones_like(key, dtype=torch.bool)

    def as_mask(self, batch: int, queries: int, keys: int, device: torch.device) -> torch.Tensor:
        """All terms as one boolean that broadcasts to [B, Hq, Lq, Lk]."""
        terms, mask = self._replace(mask=None), self.mask
        if terms.is_empty and mask is not None:
            return mask
        index, row, column = (torch.arange(size, device=device) for size in (batch, queries, keys))
        seen = terms.seen(index[:, None, None, None], 0, row[:, None], column)
        return seen if mask is None else seen & mask

    def of(self, batch: slice) -> Visibility:
        """The same of some batch entries."""
        padding, of_queries, of_keys = (
            None if x is None else x[batch] for x in (self.key_padding, self.query_documents, self.key_documents)
        )
        mask = self.mask if self.mask is None or self.mask.shape[0] == 1 else self.mask[batch]
        return self.with_tensors(padding, of_queries, of_keys, mask)

    def cut(self, rows: slice, keys: slice) -> Visibility:
        """The same of consecutive queries and keys, without a general mask."""
        first_row, first_key = rows.start or 0, keys.start or 0
        padding = None if self.key_padding is None else self.key_padding[:, keys]
        of_queries = None if self.query_documents is None else self.query_documents[:, rows]
        of_keys = None if self.key_documents is None else self.key_documents[:, keys]
        return self._replace(
            causal_offset=self.causal_offset + first_row - first_key,
            key_padding=padding,
            query_documents=of_queries,
            key_documents=of_keys,
        )

    def effective_config(self, config: S2OConfig, keys: int | None = None) -> S2OConfig:
        """The configuration as far as such a call, of so many `keys` if that is known, can follow it.

        Neighbouring queries of other documents, or under a general mask, have no mean that could rank keys for them
        all, so every query is a guide. Queries that see different keys of the history are not merged, and a block's
        mean cannot stand for keys of which a query sees only some, so there they are sampled.
        """
        if self.query_documents is not None or self.mask is not None:
            config = config.with_ranking(pool=1, guides="head")
        is_short = isinstance(keys, int) and keys < config.ranking.merge_length
        if config.ranking.merges and (is_short or self.rows_differ):
            config = config.with_ranking(radius=0.0)
        if self.rows_differ and config.ranking.rule == "means":
            config = config.with_ranking(rule="sampled")
        return config


def masked(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Keys or values [..., Lk, D] with those that are not `valid` [..., Lk] set to zero, whatever they hold."""
    return x if valid is None else torch.where(valid[..., None], x, 0)
