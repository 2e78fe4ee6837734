"""The soft cap of logits."""

from __future__ import annotations

import torch


def soft_cap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """`softcap` * tanh(logits / `softcap`), as in Gemma 2 (arXiv 2408.00118); the logits themselves where it is 0."""
    # A cap of less than the floor, which float32 may not have, caps everything to nothing as well.
    return (logits / max(softcap, 1e-37)).tanh_().mul_(softcap) if softcap else logits
