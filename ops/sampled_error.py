"""How far a call is off, by a sample of its queries: the error is measured, not bounded by theory.

What the theory gives without extra work is the threshold itself (`rule.sampling`): it bounds the variance of a row's
mass by threshold times the mass of the tail, which is at most 1, whatever the model. A few rows of dense attention say
more, and cost their share of the queries.
"""

from __future__ import annotations

import torch

from .dense import decode_attention
from .observe import SparseInputs
from .rule.sampling import draws
from .visibility import Visibility


def sampled_error(call: SparseInputs, output: torch.Tensor, rows: int, draw: int) -> torch.Tensor:
    """The squared error of some queries, and what it is relative to.

    Args:
        call: The call, without sinks.
        output: What it returned, [B, Hq, Lq, Dv].
        rows: How many queries to compare, evenly spread; all if there are no more.
        draw: Which of many samples to take.

    Returns:
        sum |o - o_dense|^2 and sum |o_dense|^2 over these queries of all heads: [2], float64, dense in float32.
    """
    device, call = output.device, call.in_order
    index = _sampled_rows(output.shape[2], rows, draw, device)
    batch, heads = (torch.arange(size, device=device) for size in output.shape[:2])
    keys = torch.arange(call.key.shape[2], device=device)
    seen = call.visibility.seen(batch[:, None, None, None], heads[:, None, None], index[:, None], keys)
    query = call.query[:, :, index].float()
    with torch.autocast(device.type, enabled=False):
        dense = decode_attention(query, call.key, call.value, Visibility(mask=seen), call.scale, call.softcap, None)
    error = output[:, :, index].float() - dense
    return torch.stack([x.double().square().sum() for x in (error, dense)])


def _sampled_rows(queries: int, rows: int, draw: int, device: torch.device) -> torch.Tensor:
    """Positions of `rows` of the queries, or of all if there are no more; made on the device, not to wait for it."""
    positions = torch.arange(min(rows, queries), device=device)
    if rows >= queries:
        return positions
    return (draws(positions, torch.full((), draw, device=device)) * queries).long()
