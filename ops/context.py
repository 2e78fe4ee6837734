"""The operators ``torch.ops.s2o.attention_context`` and ``attention_context_stats``: a sequence over several ranks.

Each rank holds some positions of the sequence. It gathers the keys and values of all, and attends its own queries to
them, one call of ``s2o::attention`` for each run of consecutive positions. Nothing else is sent: lists of keys differ
by segment, and together they hold almost every key.

Both are compositions that validate, cast under autocast and call an operator that is opaque to the compiler, and reads
at run time which rank it is, so that graphs are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from .config import S2OConfig
from .dispatch import DENSE_AT_ANY_LENGTH, choose_sparse
from .distributed import holding_all_keys, refuse_dtensors
from .layout import LAYOUTS, Block, blocks_of_rank, in_order
from .operator import autocast, library
from .process_group import check_alike, group_of, start_gathering
from .result import AttentionResult
from .validation import validate
from .visibility import Visibility

_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, bool is_causal=False, SymInt causal_offset=0, "
    "Tensor? key_padding=None, float? scale=None, SymInt? window=None, Tensor? query_documents=None, "
    'Tensor? key_documents=None, Tensor? mask=None, float softcap=0.0, Tensor? sinks=None, str site="", '
    '*, str group, str layout="head-tail", '
    f'float threshold={S2OConfig().threshold}, int? min_length=None, int last_queries=0, str settings=""'
)
_INNER = (
    "Tensor query, Tensor key, Tensor value, bool is_causal, SymInt causal_offset, Tensor? key_padding, float? scale, "
    "SymInt? window, Tensor? query_documents, Tensor? key_documents, float softcap, Tensor? sinks, str site, "
    "str group, str layout, str settings"
)
_RESULT = "(Tensor output, Tensor lse, Tensor visited)"

library.define(f"attention_context({_ARGUMENTS}) -> Tensor")
library.define(f"attention_context_stats({_ARGUMENTS}) -> {_RESULT}")
library.define(f"context({_INNER}) -> Tensor")
library.define(f"context_stats({_INNER}) -> {_RESULT}")


def attention_context(*arguments: Any, **keywords: Any) -> torch.Tensor:
    """The implementation of the operator, whose arguments and errors ``s2o_compile.attention`` documents.

    Tensors hold the positions of this rank, in the order that `layout` says; numbers speak of positions in the whole
    sequence. Sparse or dense is chosen as for one call of the whole sequence.
    """
    output: torch.Tensor = torch.ops.s2o.context(*_validated(*arguments, **keywords))
    return output


def attention_context_stats(*arguments: Any, **keywords: Any) -> AttentionResult:
    """`attention_context` with what `attention_stats` returns of this rank's queries."""
    return AttentionResult(*torch.ops.s2o.context_stats(*_validated(*arguments, **keywords)))


def _validated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool = False,
    causal_offset: int = 0,
    key_padding: torch.Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    query_documents: torch.Tensor | None = None,
    key_documents: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    site: str = "",
    *,
    group: str,
    layout: str = "head-tail",
    **settings: Any,
) -> tuple[Any, ...]:
    """The arguments of the inner operators, from those of the outer ones in the order of their schema."""
    refuse_dtensors(query=query, key=key, value=value)
    config = S2OConfig.from_arguments(**settings)
    query, key, value = autocast(query, key, value)
    terms = Visibility(is_causal, causal_offset, key_padding, window, query_documents, key_documents)
    validate(query, key, value, terms, scale, softcap, sinks)
    if mask is not None:
        raise ValueError(
            "mask must be None where the sequence is sharded over ranks: is_causal, window, key_padding and documents "
            "can say which keys a query sees"
        )
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"key must have the length of query ({query.shape[2]}) where the sequence is sharded over ranks, "
            f"not {key.shape[2]}"
        )
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be {' or '.join(map(repr, LAYOUTS))}, not {layout!r}")
    return (query, key, value, is_causal, causal_offset, key_padding, scale, window, query_documents, key_documents,
            softcap, sinks, site, group, layout, config.as_json)  # fmt: skip


class Whole(NamedTuple):
    """Keys and values [B, Hkv, Lk, D] of the whole sequence, with padding and documents [B, Lk]."""

    key: torch.Tensor
    value: torch.Tensor
    key_padding: torch.Tensor | None
    key_documents: torch.Tensor | None

    @classmethod
    def gathered(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding: torch.Tensor | None,
        key_documents: torch.Tensor | None,
        group: Any,
        layout: str,
    ) -> Whole:
        """What all ranks hold, in the order of the sequence; values travel while keys are put in order."""
        parts = ((key_padding, 1), (key_documents, 1), (key, 2), (value, 2))
        started = [None if x is None else start_gathering(x.movedim(dim, 0), group) for x, dim in parts]
        ordered: list[Any] = [
            None if wait is None else in_order(wait(), group.size(), layout).movedim(0, dim)
            for wait, (_, dim) in zip(started, parts, strict=True)
        ]
        padding, documents, key, value = ordered
        return cls(key, value, padding, documents)

    def up_to(self, end: int) -> Whole:
        """The same of the first keys."""
        padding, documents = (x if x is None else x[:, :end] for x in (self.key_padding, self.key_documents))
        return Whole(self.key[:, :, :end], self.value[:, :, :end], padding, documents)


def _check_alike(
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    group: Any,
) -> None:
    batch, heads, length, channels = key.shape
    of_documents = 0 if key_documents is None else key_documents.element_size()
    numbers = {
        "the length of key": length, "the batch size of key": batch, "the number of heads of key": heads,
        "the number of channels of key": channels, "the number of channels of value": value.shape[3],
        "the size in bytes of an element of key": key.element_size(),
        "whether there is a key_padding": int(key_padding is not None),
        "the size in bytes of an element of key_documents": of_documents,
    }  # fmt: skip
    check_alike(numbers, group, key.device)


def _attended(
    operator: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    is_causal: bool,
    causal_offset: int,
    key_padding: torch.Tensor | None,
    scale: float | None,
    window: int | None,
    query_documents: torch.Tensor | None,
    key_documents: torch.Tensor | None,
    softcap: float,
    sinks: torch.Tensor | None,
    site: str,
    group: str,
    layout: str,
    settings: str,
) -> Iterator[tuple[Block, Any]]:
    """The blocks of this rank, each with what an operator gives for it."""
    ranks, config = group_of(group), S2OConfig.from_json(settings)
    _check_alike(key, value, key_padding, key_documents, ranks)
    if layout == "head-tail" and query.shape[2] % 2:
        raise ValueError(f"query must have an even length with layout='head-tail', not {query.shape[2]}")
    whole = Whole.gathered(key, value, key_padding, key_documents, ranks, layout)
    length, keys = query.shape[2], whole.key.shape[2]
    shapes = (*query.shape[:2], keys, query.shape[3]), whole.key.shape, whole.value.shape
    terms = Visibility(is_causal, causal_offset, window=window)
    is_sparse = choose_sparse(*shapes, terms, query.device, config)
    options = config.arguments() | {"min_length": 0 if is_sparse else DENSE_AT_ANY_LENGTH}
    for block in blocks_of_rank(ranks.rank(), ranks.size(), length, layout, config.ranking.segment):
        row, position, count = block
        end = position + count
        seen = whole.up_to(max(0, min(keys, end + causal_offset)) if is_causal else keys)
        documents = None if query_documents is None else query_documents[:, row : row + count]
        options["last_queries"] = max(0, end - keys + config.last_queries)
        with holding_all_keys():
            result = operator(
                query[:, :, row : row + count], seen.key, seen.value, is_causal, causal_offset + position,
                seen.key_padding, scale, window, documents, seen.key_documents, None, softcap, sinks, site, **options,
            )  # fmt: skip
        yield block, result


def _context(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    output = AttentionResult.empty(query, value, 1).output
    for block, part in _attended(torch.ops.s2o.attention, query, key, value, *rest):
        output[:, :, block.row : block.row + block.length] = part
    return output


def _context_stats(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> AttentionResult:
    parts = [part for _, part in _attended(torch.ops.s2o.attention_stats, query, key, value, *rest)]
    output, lse, visited = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return AttentionResult(output.transpose(1, 2).contiguous().transpose(1, 2), lse, visited)


def _fake_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return AttentionResult.empty(query, value, 1).output


def _fake_result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> AttentionResult:
    tile, (layout, length) = S2OConfig.from_json(rest[-1]).ranking.tile, (rest[-2], query.shape[2])
    result = AttentionResult.empty(query, value, tile)
    tiles = 2 * -(-(length // 2) // tile) if layout == "head-tail" else -(-length // tile)
    return result._replace(visited=query.new_empty(*query.shape[:2], tiles, dtype=torch.int64))


library.impl("attention_context", attention_context, "CompositeImplicitAutograd")
library.impl("attention_context_stats", attention_context_stats, "CompositeImplicitAutograd")
library.impl("context", _context, "CompositeExplicitAutograd")
library.impl("context_stats", _context_stats, "CompositeExplicitAutograd")
torch.library.register_fake("s2o::context", _fake_output, lib=library)
torch.library.register_fake("s2o::context_stats", _fake_result, lib=library)
