"""What the tests of all implementations compare with."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.ops import AttentionResult


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Dense attention in float64, spelled out; zeros for rows that see nothing."""
    query, key, value = (x.double() for x in (query, key, value))
    group = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query @ key.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return torch.softmax(logits, -1).masked_fill(~mask, 0) @ value


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What PyTorch itself computes, in the inputs' dtype."""
    # Its GPU kernels give NaN for some unaligned strides.
    query, key, value = (x.contiguous() for x in (query, key, value))
    output = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    return output.masked_fill(~mask.any(-1, keepdim=True), 0)


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
