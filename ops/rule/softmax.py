"""The soft cap of logits."""

from __future__ import annotations

import torch

LEAST_SOFTCAP = 1e-37
"""What logits are divided by at least: float32 may not have less, and any cap below leaves nothing of them."""


def soft_cap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """`softcap` * tanh(logits / `softcap`), as in Gemma 2 (arXiv 2408.00118); the logits themselves where it is 0."""
    return (logits / max(softcap, LEAST_SOFTCAP)).tanh_().mul_(softcap) if softcap else logits
