"""The output for queries that see no key, where keys are hidden by a finite number.

A softmax of scores that are all hidden by one number is one of what that leaves of them: nothing where the number is in
their place, or is so large that it does not change by adding a score, so that all keys weigh the same; the scores
themselves where the number is small. With -inf it gives NaN, which nobody can want, and the operator gives zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from ..graph.node_values import holds, may_hold
from .clauses import Clause
from .expressions import KEY, QUERY, Index, bounds

_ABSORBING = -1e30
"""From here down, adding a score changes no number of any dtype with so large ones."""
_ROUNDING = 2e-3
"""The rounding of scores that goes unnoticed, as logits."""


class EmptyRows(Enum):
    """The output for queries that see no key; zeros also stand for masks that have no such query."""

    ZEROS = "zeros"
    MEAN = "the mean of all values"
    UNMASKED = "what they get without the mask"


@dataclass(frozen=True)
class Hiding:
    """How a mask hides keys.

    Attributes:
        value: What stands in place of hidden scores, or is added to them.
        added_to: The dtype of the scores that it is added to; None if it takes their place.
    """

    value: float
    added_to: torch.dtype | None

    @classmethod
    def of(cls, value: float, scores: torch.Tensor | None, least: float) -> Hiding:
        """A number added to `scores`, or stored where these are None, before lesser ones are raised to `least`."""
        if value < least:
            return cls(least, None)
        if scores is not None and value < torch.finfo(scores.dtype).min:
            value = -math.inf
        return cls(value, None if scores is None else scores.dtype)


def of_finite_masks(hidden: Sequence[Hiding]) -> EmptyRows | None:
    """The output for queries that see no key, where a mask hides by a finite number; None if it is none of these."""
    first = hidden[0]
    if first.added_to is None:
        return EmptyRows.MEAN if set(hidden) == {first} else None
    if len(hidden) > 1:
        return None
    if first.value <= _ABSORBING:
        return EmptyRows.MEAN
    return EmptyRows.UNMASKED if -first.value * torch.finfo(first.added_to).eps < _ROUNDING else None


def every_query_sees_a_key(found: Iterable[Clause], shape: Sequence[sympy.Expr], query: torch.Tensor) -> bool:
    """Whether each query sees the key at its own position, counted from either end, or each sees the first key.

    Args:
        found: The clauses that all hold where a query sees a key.
        shape: Of the scores.
        query: A fake tensor of the graph, which is guarded by what a positive answer depends on.
    """
    later = shape[3] - shape[2]
    cases = [
        [room, *needs]
        for key, room in ((QUERY + later, later), (QUERY, later), (sympy.Integer(0), shape[3] - 1))
        if (needs := _needs(key, found, tuple(shape), query)) is not None and may_hold(room, query)
    ]
    fewest_guards = min(cases, key=lambda case: sum(need.is_nonnegative is None for need in case), default=None)
    return fewest_guards is not None and all(holds(need, query) for need in fewest_guards)


def _needs(
    key: sympy.Expr, found: Iterable[Clause], shape: tuple[sympy.Expr, ...], query: torch.Tensor
) -> list[sympy.Expr] | None:
    """Expressions that must be at least zero for each query to see one key; None if one is not at the traced sizes."""
    needs = []
    for clause in found:
        least = [least for literal in clause if may_hold(least := _least(key, literal, shape), query)]
        if not least:
            return None
        needs.append(next((need for need in least if need.is_nonnegative), least[0]))
    return needs


def _least(key: sympy.Expr, literal: Boolean, shape: tuple[sympy.Expr, ...]) -> sympy.Expr:
    """An expression that is at least zero only if a literal holds at one key of each query."""
    expression = sympy.expand(literal.lhs.xreplace({KEY: key}))
    if isinstance(literal, sympy.Ge):
        ends = bounds(expression, shape)
        return sympy.Integer(-1) if ends is None or ends[0].atoms(AppliedUndef, Index) else ends[0]
    return sympy.Integer(0 if expression.is_zero is isinstance(literal, sympy.Eq) else -1)
