"""What the tests of all implementations compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from s2o_compile.ops import AttentionResult
from s2o_compile.ops.visibility import Visibility

COARSEST = 0.13 if torch.cuda.is_available() else 0.51
"""Largest share of a number that float8 loses; the interpreter forgets to carry where rounding reaches a power of 2."""


def seen(query: torch.Tensor, key: torch.Tensor, terms: Visibility) -> torch.Tensor:
    """What each row may see [B or 1, Hq or 1, Lq, Lk], spelled out."""
    rows = torch.arange(query.shape[2], device=key.device)[:, None] + terms.causal_offset
    columns = torch.arange(key.shape[2], device=key.device)
    mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=key.device)
    if terms.is_causal:
        mask = mask & (columns <= rows)
    if terms.window is not None:
        mask = mask & (rows - columns < terms.window)
    if terms.key_padding is not None:
        mask = mask & terms.key_padding[:, None, None]
    if terms.query_documents is not None and terms.key_documents is not None:
        mask = mask & (terms.query_documents[:, None, :, None] == terms.key_documents[:, None, None])
    return mask if terms.mask is None else mask & terms.mask


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention in float64, spelled out; zeros for rows that see nothing."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat([logits, sinks.double()[:, None, None].expand(*logits.shape[:-1], 1)], -1)
    return torch.softmax(logits, -1)[..., : key.shape[2]].masked_fill(~mask, 0) @ value


ROUNDING = (1e-6, 1e-5, 1e-4, 1e-3)
"""How far importances in float32 may be off, relative to themselves."""


def share_at_the_threshold(
    got: AttentionResult, specified: Callable[[float], AttentionResult], threshold: float, tile: int, tolerance: float
) -> float:
    """Compare all tiles with what is specified, and say of how many a key is too close to the threshold to decide.

    Those must be what is specified for some threshold that differs by no more than `ROUNDING`.
    """
    exact = agreeing_tiles(got, specified(threshold), tile, tolerance)
    agreed = exact
    for step in (sign * size for size in ROUNDING for sign in (1, -1)):
        if agreed.all():
            break
        agreed = agreed | agreeing_tiles(got, specified(threshold * (1 + step)), tile, tolerance + 10 * abs(step))
    assert agreed.all(), f"tiles that differ [batch, head, tile]: {(~agreed).nonzero().tolist()}"
    return float((~exact).double().mean())


def agreeing_tiles(got: AttentionResult, want: AttentionResult, tile: int, tolerance: float) -> torch.Tensor:
    """Of which tiles output, log-sum-exp and visited work agree [B, Hq, tiles]."""
    output = (got.output.double() - want.output.double()).abs().amax(-1)
    lse = torch.where(got.lse == want.lse, 0, (got.lse.double() - want.lse.double()).abs())
    worst = pad(output.maximum(lse), (0, -output.shape[-1] % tile)).unflatten(-1, (-1, tile)).amax(-1)
    return (worst <= tolerance) & (got.visited == want.visited)


def sdpa(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float | None = None
) -> torch.Tensor:
    """What PyTorch itself computes, in the inputs' dtype."""
    # Its GPU kernels give NaN for some unaligned strides.
    query, key, value = (x.contiguous() for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return output.masked_fill(~mask.any(-1, keepdim=True), 0)


def allowed_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    want: torch.Tensor,
    scale: float | None = None,
) -> float:
    """Twice what SDPA errs without soft cap and sinks, which it lacks, or a rounding of what is wanted, or 1e-5."""
    error = largest_difference(sdpa(query, key, value, mask, scale), dense(query, key, value, mask, scale))
    rounding = torch.finfo(query.dtype).eps * largest_difference(want, torch.zeros_like(want))
    return max(2 * error, rounding, 1e-5)


def largest_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of all elements; 0 for empty tensors."""
    return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0


def assert_same(got: AttentionResult, want: AttentionResult, tolerance: float) -> None:
    """Outputs and log-sum-exps close, visited work equal."""
    assert largest_difference(got.output, want.output) <= tolerance
    empty = want.lse == -torch.inf
    assert torch.equal(got.lse == -torch.inf, empty)
    assert largest_difference(got.lse[~empty], want.lse[~empty]) <= max(tolerance, 1e-5)
    assert torch.equal(got.visited, want.visited)
