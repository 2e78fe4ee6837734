"""Finds the largest threshold at which a call keeps its error budget."""

from __future__ import annotations

import math
from collections.abc import Callable

from .sites import Measurement

LARGEST = 0.5
"""No threshold above this is tried."""
_FIRST = 8.0
"""The first try, in budgets."""
_EXPONENT = 1.4
"""The error grows about as the threshold to this power."""
_AIM, _LEAST = 0.9, 0.8
"""The share of the budget to aim at, and that from which the search is over."""
_ROUNDS = 10
_LONGEST_STEP = 16.0


def find_threshold(
    measure: Callable[[float], Measurement], error_budget: float, ceiling: float | None = None
) -> Measurement | None:
    """The largest threshold tried whose error is within the budget.

    Each try takes the error to be a power of the threshold through the last one, within what is known to be too low
    and too high.

    Args:
        measure: Measures the call at a threshold.
        error_budget: The largest relative squared error.
        ceiling: Where to start, and the largest threshold to try; by default to start low and go up to `LARGEST`.

    Returns:
        What was measured there; None if nothing tried was within the budget, or an error is no number.
    """
    best: Measurement | None = None
    high = math.inf
    threshold = min(_FIRST * error_budget, LARGEST) if ceiling is None else ceiling
    for _ in range(_ROUNDS):
        found = measure(threshold)
        if not math.isfinite(found.error):
            return None
        if found.error > error_budget:
            high = threshold
        else:
            best = found
            if found.error >= _LEAST * error_budget or threshold == (ceiling or LARGEST):
                break
        threshold = _next(found, error_budget, 0.0 if best is None else best.threshold, high, ceiling or LARGEST)
    return best


def _next(last: Measurement, error_budget: float, low: float, high: float, ceiling: float) -> float:
    """The threshold at which a power law through the last try meets the budget, kept between bounds."""
    step = (_AIM * error_budget / last.error) ** (1 / _EXPONENT) if last.error else _LONGEST_STEP
    threshold = min(ceiling, last.threshold * min(max(step, 1 / _LONGEST_STEP), _LONGEST_STEP))
    return threshold if low < threshold < high else math.sqrt(low * high)
