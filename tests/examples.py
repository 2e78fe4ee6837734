"""How many examples a costly test of random inputs draws."""

from __future__ import annotations

from hypothesis import settings


def examples(count: int) -> int:
    """So many, and ten times as many in the profile "thorough"."""
    return count * settings.default.max_examples // 100
