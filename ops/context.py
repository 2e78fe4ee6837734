"""The operators ``torch.ops.s2o.attention_context`` and ``attention_context_stats``: a sequence over several ranks.

Each rank holds some positions of the sequence. It gathers the keys and values of all, and attends its own queries to
them, one call for each run of consecutive positions. Lists of keys differ by segment, and together they hold almost
every key, so all keys are sent. A few queries are too, by which all ranks choose alike (`samples`).

Both are compositions that validate, cast under autocast and call an operator that is opaque to the compiler, and reads
at run time which rank it is, so that graphs are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import torch

from .config import S2OConfig
from .dense import positive_scale
from .dispatch import choose_sparse
from .distributed import holding_all_keys, refuse_dtensors
from .layout import LAYOUTS, Block, are_in_order, blocks_of_rank, in_order
from .operator import Call, autocast, library, with_channels, without_autocast
from .part import Part
from .process_group import check_alike, group_of, start_gathering
from .result import AttentionResult
from .samples import Samples
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
_LENGTH = "the length of key"
_ADVICE = {_LENGTH: "pad the sequence, so that it divides evenly"}
_Answer = TypeVar("_Answer")
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
    """Keys and values [B, Hkv, Lk, D] of the whole sequence, and its mask.

    Values may still travel: what follows `arrive` on the current stream waits for them.
    """

    key: torch.Tensor
    value: torch.Tensor
    terms: Visibility
    arrive: Callable[[], Any]

    @classmethod
    def gathered(cls, key: torch.Tensor, value: torch.Tensor, terms: Visibility, group: Any, layout: str) -> Whole:
        """What all ranks hold, in the order of the sequence."""
        parts = (*((x, 1) for x in terms.tensors), (key, 2))
        started = [None if x is None else start_gathering(x.movedim(dim, 0), group) for x, dim in parts]
        ranks, travelling = group.size(), [start_gathering(value.movedim(2, 0), group)]
        values = travelling[0].rows
        ordered_values = values if are_in_order(ranks, layout) else torch.empty_like(values)

        def arrive() -> None:
            if travelling:  # Until it succeeds once; what was gathered is then free again.
                travelling[0].wait()
                in_order(travelling[0].rows, ranks, layout, ordered_values)
                travelling.clear()

        ordered: list[Any] = []
        for gathering, (_, dim) in zip(started, parts, strict=True):
            if gathering is not None:
                gathering.wait()
            ordered.append(None if gathering is None else in_order(gathering.rows, ranks, layout).movedim(0, dim))
        *tensors, key = ordered
        return cls(key, ordered_values.movedim(0, 2), terms.with_tensors(*tensors), arrive)

    def seen_by(self, queries: range, is_cut: bool) -> Whole:
        """The same for some queries; `is_cut` to the keys that they may see, where nothing is chosen by all."""
        end = self.key.shape[2]
        if is_cut and self.terms.is_causal:
            end = max(0, min(end, queries.stop + self.terms.causal_offset))
        terms = self.terms.cut(slice(queries.start, queries.stop), slice(0, end))
        return Whole(self.key[:, :, :end], self.value[:, :, :end], terms, self.arrive)


def _check_alike(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    terms: Visibility,
    samples: Samples,
    group: Any,
    layout: str,
    config: S2OConfig,
) -> None:
    batch, heads, length, channels = key.shape
    of_keys, of_queries = (0 if x is None else x.element_size() for x in (terms.key_documents, terms.query_documents))
    guides, outputs = (0 if x is None else len(x) for x in samples)
    numbers = {
        _LENGTH: length, "the batch size of key": batch, "the number of heads of key": heads,
        "the number of channels of key": channels, "the number of channels of value": value.shape[3],
        "the size in bytes of an element of key": key.element_size(),
        "whether key is bfloat16": int(key.dtype == torch.bfloat16),
        "whether there is a key_padding": int(terms.key_padding is not None),
        "the size in bytes of an element of key_documents": of_keys,
        "the size in bytes of an element of query_documents": of_queries,
        "the number of heads of query": query.shape[1],
        "the number of queries by which channels are chosen": guides,
        "the number of queries by which the size of outputs is estimated": outputs,
        "ranking.pool": config.ranking.pool, "whether ranking.guides is 'head'": int(config.ranking.guides == "head"),
        "whether layout is 'head-tail'": int(layout == "head-tail"),
    }  # fmt: skip
    check_alike(numbers, _ADVICE, group, key.device)


def _attended(
    attend: Callable[[Call, Part | None], _Answer],
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
) -> Iterator[tuple[Block, _Answer]]:
    """The blocks of this rank, each with what `attend` answers to its call and `Part`; None for one to run dense."""
    ranks, config = group_of(group), S2OConfig.from_json(settings)
    query, scale = positive_scale(with_channels(query), scale)
    key, length, keys = with_channels(key), query.shape[2], query.shape[2] * ranks.size()
    terms = Visibility(is_causal, causal_offset, key_padding, window, query_documents, key_documents)
    of_query, of_key, of_value = ((*x.shape[:2], keys, x.shape[3]) for x in (query, key, value))
    is_sparse = choose_sparse(of_query, of_key, of_value, terms, query.device, query.dtype, config)
    # A block whose queries see less than those of the sequence must not follow more of the settings.
    config = terms.simplified(keys, keys).effective_config(config, keys)
    samples = Samples.of(query, key.shape[1], keys, config) if is_sparse else Samples(None, None)
    _check_alike(query, key, value, terms, samples, ranks, layout, config)
    if layout == "head-tail" and length % 2:
        raise ValueError(f"query must have an even length with layout='head-tail', not {length}")
    blocks = blocks_of_rank(ranks.rank(), ranks.size(), length, layout, config.ranking.segment)
    sampled = samples.start_gathering(query, key.shape[1], config, blocks, ranks)
    whole = Whole.gathered(key, value, terms, ranks, layout)
    part = sampled(whole.terms, whole.arrive) if is_sparse else None
    if part is None:
        whole.arrive()
    options = config.arguments()
    for block in blocks:
        row, position, count = block
        end = position + count
        seen = whole.seen_by(range(position, end), is_cut=not is_sparse)
        options["last_queries"] = max(0, end - keys + config.last_queries)
        # Autocast would cast values that still travel; a graph was traced with what it gave then.
        with holding_all_keys(), without_autocast(query.device.type):
            call = Call.of(
                query[:, :, row : row + count], seen.key, seen.value, **seen.terms._asdict(), scale=scale,
                softcap=softcap, sinks=sinks, site=site, **options,
            )  # fmt: skip
            answer = attend(call, part)
        yield block, answer


def _output(call: Call, part: Part | None) -> torch.Tensor:
    return call.dense() if part is None else call.sparse(part).output


def _result(call: Call, part: Part | None) -> AttentionResult:
    return call.spans() if part is None else call.sparse(part)


def _context(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    output = AttentionResult.empty(query, value, 1).output
    for block, part in _attended(_output, query, key, value, *rest):
        output[:, :, block.row : block.row + block.length] = part
    return output


def _context_stats(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> AttentionResult:
    parts = [part for _, part in _attended(_result, query, key, value, *rest)]
    output, lse, visited = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return AttentionResult(output.transpose(1, 2).contiguous().transpose(1, 2), lse, visited)


def _fake_output(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return AttentionResult.empty(query, value, 1).output


def _fake_result(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> AttentionResult:
    """As many tiles as the blocks of a rank have, the same on all: two are one only where tiles end where they meet."""
    *_, group, layout, settings = rest
    tile, half = S2OConfig.from_json(settings).ranking.tile, query.shape[2] // 2
    result = AttentionResult.empty(query, value, tile)
    if are_in_order(group_of(group).size(), layout):
        return result
    return result._replace(visited=query.new_empty(*query.shape[:2], 2 * -(-half // tile), dtype=torch.int64))


library.impl("attention_context", attention_context, "CompositeImplicitAutograd")
library.impl("attention_context_stats", attention_context_stats, "CompositeImplicitAutograd")
library.impl("context", _context, "CompositeExplicitAutograd")
library.impl("context_stats", _context_stats, "CompositeExplicitAutograd")
torch.library.register_fake("s2o::context", _fake_output, lib=library)
torch.library.register_fake("s2o::context_stats", _fake_result, lib=library)
