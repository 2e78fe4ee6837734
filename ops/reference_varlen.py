"""The specification of packed requests: each is attended alone, as `ops.reference_variants` specifies it.

Request n has the queries i from cu_seq_q[n] to below cu_seq_q[n + 1], and the keys j = 0, 1, .. below its length: the
first of those from cu_seq_k[n] to below cu_seq_k[n + 1], or, in pages of b keys, key j is

    pool[block_table[n, j // b], j % b]

and nothing else is read. The last query stands at the last key: query i of Lq sees key j of Lk where

    -left <= j - (i + Lk - Lq) <= right

for a `window_size` (left, right), -1 bounding nothing on its side; so (-1, 0) is causal from the bottom right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import S2OConfig, replaced
from .reference_variants import reference_attention
from .visibility import Visibility


def reference_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Sequence[int],
    cu_seq_k: Sequence[int] | None,
    seqused_k: Sequence[int] | None = None,
    block_table: Sequence[Sequence[int]] | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    config: S2OConfig | None = None,
    is_sparse: Sequence[bool] | None = None,
) -> Tensor:
    """The output [T, Hq, Dv], in the dtype of the query; zeros for rows of no request.

    Args:
        query: [T, Hq, D].
        key: [Tk, Hkv, D], or pages [blocks, b, Hkv, D] with a `block_table`.
        value: As `key`, of Dv channels.
        cu_seq_q: [N + 1].
        cu_seq_k: [N + 1]; not used with a `block_table`.
        seqused_k: [N], how many keys count; None for all.
        block_table: [N, M].
        window_size: (left, right).
        scale: Factor of the logits, by default D ** -0.5.
        softcap: Bound of the logits, 0 for none.
        sinks: [Hq], None for none.
        config: As in `ops.reference`.
        is_sparse: [N], which requests are worth sparse attention, by default all; the others attend to all keys.
    """
    config = config or S2OConfig()
    output = query.new_zeros(*query.shape[:2], value.shape[-1])
    for n in range(len(cu_seq_q) - 1):
        places = _places(n, key, cu_seq_k, seqused_k, block_table)
        rows = slice(cu_seq_q[n], cu_seq_q[n + 1])
        terms = _terms(rows.stop - rows.start, len(places), window_size)
        keys, values = (
            torch.stack([x[place] for place in places]) if places else x.new_zeros(0, *x.shape[-2:])
            for x in (key, value)
        )
        of_request = config if is_sparse is None or is_sparse[n] else replaced(config, threshold=0.0)
        alone = [x.transpose(0, 1)[None] for x in (query[rows], keys, values)]
        result = reference_attention(
            alone[0], alone[1], alone[2], terms, scale=scale, softcap=softcap, sinks=sinks, config=of_request
        )
        output[rows] = result.output[0].transpose(0, 1)
    return output


def _places(
    n: int,
    key: Tensor,
    cu_seq_k: Sequence[int] | None,
    seqused_k: Sequence[int] | None,
    block_table: Sequence[Sequence[int]] | None,
) -> list[tuple[int, ...]]:
    """Where each key of request n is in the pool, in order."""
    if block_table is not None:
        assert seqused_k is not None
        size = key.shape[1]
        return [(block_table[n][j // size], j % size) for j in range(seqused_k[n])]
    assert cu_seq_k is not None
    count = cu_seq_k[n + 1] - cu_seq_k[n] if seqused_k is None else seqused_k[n]
    return [(cu_seq_k[n] + j,) for j in range(count)]


def _terms(queries: int, keys: int, window_size: tuple[int, int]) -> Visibility:
    """The inequality above in terms of `Visibility`: j <= i + offset where bounded, i + offset - j < window."""
    left, right = window_size
    if right == -1:
        return Visibility(False, keys - queries, window=None if left == -1 else left + 1)
    offset = keys - queries + right
    return Visibility(True, offset, window=None if left == -1 else left + right + 1)
