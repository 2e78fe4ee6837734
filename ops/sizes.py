"""Comparisons of sizes, which are symbolic while a graph is traced."""

from __future__ import annotations

from typing import Any

import torch


def statically_known_true(comparison: bool | torch.SymBool) -> bool:
    """Whether a comparison holds for all values that its symbols may have."""
    if isinstance(comparison, bool):
        return comparison
    # Imports sympy, which takes longer than the rest of this package.
    from torch.fx.experimental import symbolic_shapes

    return symbolic_shapes.statically_known_true(comparison)


UNBOUNDED = 2**62
"""In place of infinity."""


def bounds(size: int | torch.SymInt) -> tuple[int, int]:
    """The least and the largest value that a size is known to have."""
    if isinstance(size, int):
        return size, size
    found = size.node.shape_env.bound_sympy(size.node.expr)
    return _finite(found.lower), _finite(found.upper)


def _finite(bound: Any) -> int:
    return int(max(-UNBOUNDED, min(bound, UNBOUNDED)))
