"""Comparisons of sizes, which are symbolic while a graph is traced."""

from __future__ import annotations

import torch


def statically_known_true(comparison: bool | torch.SymBool) -> bool:
    """Whether a comparison holds for all values that its symbols may have."""
    if isinstance(comparison, bool):
        return comparison
    # Imports sympy, which takes longer than the rest of this package.
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(comparison)
