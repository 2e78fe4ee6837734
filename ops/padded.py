"""Packed requests of a few queries each as one batch of the operator, padded on the left: they end together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from .requests import Request, visibility_of
from .upload import uploaded


def of_similar_length(requests: Iterable[Request]) -> list[list[Request]]:
    """Requests in groups whose keys are as many up to a factor of 2, so that at most half of a batch is padding."""
    groups: dict[int, list[Request]] = {}
    for request in requests:
        groups.setdefault(request.key_count.bit_length(), []).append(request)
    return list(groups.values())


def attend_padded(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    requests: Sequence[Request],
    window_size: Sequence[int],
    **arguments: Any,
) -> torch.Tensor:
    """The output of one call of the operator for some requests, [sum of their queries, Hq, Dv].

    Args:
        query: [sum of their queries, Hq, D], one request after the other.
        key: [sum of their keys, Hkv, D].
        value: [sum of their keys, Hkv, Dv].
        requests: At least one.
        window_size: As of ``s2o_compile.attention_varlen``.
        **arguments: Others of ``torch.ops.s2o.attention``.
    """
    queries, keys = [request.query_count for request in requests], [request.key_count for request in requests]
    batch = [_padded(x, lengths) for x, lengths in ((query, queries), (key, keys), (value, keys))]
    terms = visibility_of(max(queries), max(keys), window_size)
    missing = uploaded([max(keys) - count for count in keys], query.device)
    valid = torch.arange(max(keys), device=query.device) >= missing[:, None]
    output = torch.ops.s2o.attention(*batch, **terms._replace(key_padding=valid)._asdict(), **arguments)
    return torch.cat([rows[-count:] for rows, count in zip(output.transpose(1, 2), queries, strict=True)])


def _padded(x: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Requests of these lengths [sum of them, H, D] as a batch [N, H, longest, D], zeros before each."""
    return pad_sequence(list(x.split(list(lengths))), batch_first=True, padding_side="left").transpose(1, 2)
