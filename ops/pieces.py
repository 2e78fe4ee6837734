"""Dense attention in pieces that need no mask, or a small one: a mask of all queries and keys is never written out.

Where the tensors are on a CPU, padding and documents are looked at, and cut off where they are contiguous. Elsewhere
that would wait for the device, and they become masks of a few rows at a time.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from .fused import can_give_lse, with_lse
from .visibility import Visibility

ROWS = 512
"""Queries of a piece that needs a mask."""

Run = tuple[slice, slice]


def attend_in_pieces(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visibility: Visibility, scale: float
) -> torch.Tensor:
    """Dense attention without a general mask [B, Hq, Lq, Dv], stored as [B, Lq, Hq, Dv]; shapes as in `ops.operator`.

    The scale is above 0. Queries that see no key give zeros.
    """
    batch, heads, queries, _ = query.shape
    output = query.new_zeros(batch, queries, heads, value.shape[3]).transpose(1, 2)
    if query.is_cpu and not visibility.is_positional:
        for entry in range(batch):
            of_entry = slice(entry, entry + 1)
            operands = query[of_entry], key[of_entry], value[of_entry]
            _attend_entry(*operands, visibility.of(of_entry), scale, output[of_entry])
    else:
        _attend(query, key, value, visibility, scale, output)
    return output


def _attend_entry(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Visibility, scale: float, output: torch.Tensor
) -> None:
    """Attend one batch entry on a CPU, document by document, if they and its padding are contiguous."""
    runs, valid = _documents(terms), terms.key_padding
    if runs is None:
        return _attend(query, key, value, terms, scale, output)
    for rows, keys in runs:
        unpadded = keys if valid is None else _contiguous(valid[0, keys], keys.start)
        part = terms._replace(query_documents=None, key_documents=None)
        if unpadded is not None:
            keys, part = unpadded, part._replace(key_padding=None)
        part = part.cut(rows, keys)
        _attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], part, scale, output[:, :, rows])


def _documents(terms: Visibility) -> list[Run] | None:
    """The queries and the keys of each document that has both; None where one is in several places."""
    if terms.query_documents is None or terms.key_documents is None:
        return [(slice(0, None), slice(0, None))]
    of_queries, of_keys = _runs(terms.query_documents[0]), _runs(terms.key_documents[0])
    if of_queries is None or of_keys is None:
        return None
    return [(rows, of_keys[document]) for document, rows in of_queries.items() if document in of_keys]


def _runs(documents: torch.Tensor) -> dict[int, slice] | None:
    """Where each document is [L]; None where one is in several places."""
    names, counts = documents.unique_consecutive(return_counts=True)
    ends = counts.cumsum(0).tolist()
    found = {
        name: slice(end - count, end) for name, count, end in zip(names.tolist(), counts.tolist(), ends, strict=True)
    }
    return found if len(found) == len(names) else None


def _contiguous(valid: torch.Tensor, start: int) -> slice | None:
    """Where the keys [L] from `start` on are valid; None where that is in several places."""
    places = valid.nonzero()[:, 0]
    if not len(places):
        return slice(start, start)
    first, last = int(places[0]), int(places[-1])
    return slice(start + first, start + last + 1) if last - first + 1 == len(places) else None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Visibility, scale: float, output: torch.Tensor
) -> None:
    """Fill the `output` of some queries, without those at the start that see no key and the keys that none sees."""
    rows, keys = slice(0, query.shape[2]), slice(0, key.shape[2])
    if terms.is_causal:
        rows = slice(min(max(0, -terms.causal_offset), rows.stop), rows.stop)
        keys = slice(0, max(0, min(keys.stop, rows.stop + terms.causal_offset)))
    if rows.start == rows.stop or not keys.stop:
        return
    terms = terms.cut(rows, keys)
    query, key, value, output = query[:, :, rows], key[:, :, keys], value[:, :, keys], output[:, :, rows]
    if not terms.is_plain:
        _attend_masked(query, key, value, terms, scale, output)
    elif not terms.is_causal or terms.causal_offset == 0 or terms.causal_offset >= key.shape[2] - 1:
        is_causal = terms.is_causal and terms.causal_offset == 0
        output.copy_(_sdpa(query, key, value, scale, is_causal=is_causal))
    elif _can_merge(query, key, value, terms.causal_offset):
        output.copy_(_past_and_present(query, key, value, terms.causal_offset, scale))
    else:
        _attend_masked(query, key, value, terms, scale, output)


def _can_merge(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int) -> bool:
    """Whether `_past_and_present` takes these tensors."""
    parts = (slice(offset), slice(offset, None))
    return key.shape[2] == query.shape[2] + offset and all(
        can_give_lse(query, key[:, :, part], value[:, :, part]) for part in parts
    )


def _past_and_present(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offset: int, scale: float
) -> torch.Tensor:
    """Causal attention of queries that all see the first `offset` keys, from that of these and that of the others."""
    past, lse = with_lse(query, key[:, :, :offset], value[:, :, :offset], False, scale)
    present, present_lse = with_lse(query, key[:, :, offset:], value[:, :, offset:], True, scale)
    return torch.lerp(present.float(), past.float(), (lse - present_lse).sigmoid()[..., None])


def _attend_masked(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: Visibility, scale: float, output: torch.Tensor
) -> None:
    """Fill the `output` of a few rows at a time, with the keys that lie in their reach."""
    for start in range(0, query.shape[2], ROWS):
        end = min(start + ROWS, query.shape[2])
        low, high = 0, key.shape[2]
        if terms.is_causal:
            high = max(0, min(high, end + terms.causal_offset))
        if terms.window is not None:
            low = min(high, max(0, start + terms.causal_offset - terms.window + 1))
        rows, keys = slice(start, end), slice(low, high)
        part = terms.cut(rows, keys)
        mask = part.as_mask(query.shape[0], end - start, high - low, query.device)
        some = _sdpa(query[:, :, rows], key[:, :, keys], value[:, :, keys], scale, attn_mask=mask)
        output[:, :, rows] = some.masked_fill(~mask.any(-1, keepdim=True), 0)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    attn_mask: torch.Tensor | None = None,
    is_causal: bool = False,
) -> torch.Tensor:
    grouped = query.shape[1] != key.shape[1]
    return scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
    )
