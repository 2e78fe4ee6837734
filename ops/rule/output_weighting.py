"""The error of leaving a key out: how far its value lies from the outputs, in units of their root mean square.

A row that gives key j a share p of its mass errs by p (v_j - o) without it. The outputs o are not known before, but
their mean square over the queries of a KV head can be estimated from a few of them, and values that are far away are
about orthogonal to them, so that |v_j - o|^2 is about |v_j|^2 + |o|^2. Visiting keys with a probability in proportion
to the size of what they add (Neyman allocation, Cochran, Sampling Techniques, 5.5) gives the least error for the work.
"""

from __future__ import annotations

import torch

from .softmax import soft_cap

_ROWS = 64
"""Queries of a KV head from which the size of outputs is estimated."""


def sampled_rows(queries: int, heads: int, device: torch.device) -> torch.Tensor:
    """The queries of each of the `heads` query heads of a KV head that stand for all: positions [n], evenly spread."""
    count = max(1, _ROWS // heads)
    return (2 * torch.arange(count, device=device) + 1) * queries // (2 * count)


def value_distances(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor, scale: float, softcap: float
) -> torch.Tensor:
    """How far values lie from the outputs, over the root mean square of these: (1 + |v|^2 / mean |o|^2)^(1/2).

    Args:
        query: The `sampled_rows` of a KV head's query heads [..., G, n, D].
        key: [..., Lk, D].
        value: [..., Lk, Dv].
        seen: Which keys the rows see, broadcastable to [..., G, n, Lk].
        scale: Factor of the logits.
        softcap: Bound of the logits, 0 for none.

    Returns:
        [..., Lk], float32 or float64; ones where no row has an output other than zero. Rows whose output is not finite
        do not count.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    logits = (query.flatten(-3, -2) @ key.mT).to(dtype).unflatten(-2, query.shape[-3:-1])
    logits = soft_cap(logits * scale, softcap).masked_fill_(~seen, -torch.inf)
    output = (logits.softmax(-1).to(value.dtype).flatten(-3, -2) @ value).to(dtype)
    square = output.square().sum(-1)
    counts = square.isfinite()
    mean = square.masked_fill(~counts, 0).sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1)
    squares = torch.linalg.vector_norm(value, dim=-1, dtype=dtype).square()
    return torch.where(mean > 0, 1 + squares / mean, 1).sqrt()
