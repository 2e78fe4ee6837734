"""Puts predicates over whole numbers into conjunctive normal form."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

import sympy
from sympy.logic.boolalg import Boolean

Clause = frozenset[Boolean]
"""Literals of which one at least holds: ``expression >= 0``, ``expression == 0`` or ``expression != 0``."""

_MOST = 64


class TooManyClauses(Exception):
    """A predicate has more clauses than are worth looking at."""


def at_least_zero(expression: sympy.Expr) -> Boolean:
    """The literal ``expression >= 0``, or true or false where that is known."""
    expression = sympy.expand(expression)
    if expression.is_nonnegative:
        return sympy.true
    return sympy.false if expression.is_negative else sympy.Ge(expression, 0, evaluate=False)


def is_zero(expression: sympy.Expr) -> Boolean:
    """The literal ``expression == 0``, or true or false where that is known."""
    expression = sympy.expand(expression)
    if expression.is_zero is not None:
        return sympy.true if expression.is_zero else sympy.false
    sign = -1 if expression.could_extract_minus_sign() else 1
    return sympy.Eq(sign * expression, 0, evaluate=False)


def negated(literal: Boolean) -> Boolean:
    """The literal that holds where this one does not."""
    if literal in (sympy.true, sympy.false):
        return sympy.Not(literal)
    if isinstance(literal, sympy.Ge):
        return at_least_zero(-literal.lhs - 1)
    return (sympy.Ne if isinstance(literal, sympy.Eq) else sympy.Eq)(*literal.args, evaluate=False)


def clauses(predicate: Boolean, holds: bool = True) -> set[Clause]:
    """The clauses that all hold where a predicate holds, or where it does not.

    Args:
        predicate: Made from literals by and, or and not.
        holds: Which of the two.

    Raises:
        TooManyClauses: The normal form is long.
    """
    if isinstance(predicate, sympy.Not):
        return clauses(predicate.args[0], not holds)
    if isinstance(predicate, (sympy.And, sympy.Or)):
        parts = [clauses(part, holds) for part in predicate.args]
        conjunction = isinstance(predicate, sympy.And) is holds
        return _without_implied(set().union(*parts) if conjunction else _distributed(parts))
    if predicate in (sympy.true, sympy.false):
        return set() if (predicate == sympy.true) is holds else {frozenset()}
    literal = literal_of(predicate) if holds else negated(literal_of(predicate))
    return clauses(literal) if literal in (sympy.true, sympy.false) else {frozenset([literal])}


def literal_of(relation: Boolean) -> Boolean:
    """The literal that a relation is, or true or false where that is known."""
    if relation in (sympy.true, sympy.false):
        return relation
    difference = relation.lhs - relation.rhs
    if isinstance(relation, (sympy.Ge, sympy.Gt)):
        return at_least_zero(difference - int(isinstance(relation, sympy.Gt)))
    if isinstance(relation, (sympy.Le, sympy.Lt)):
        return at_least_zero(-difference - int(isinstance(relation, sympy.Lt)))
    return is_zero(difference) if isinstance(relation, sympy.Eq) else negated(is_zero(difference))


def _distributed(parts: list[set[Clause]]) -> set[Clause]:
    """The clauses of a disjunction of conjunctions."""
    if math.prod(map(len, parts)) > _MOST:
        raise TooManyClauses
    joined = (_joined(itertools.chain(*choice)) for choice in itertools.product(*parts))
    return {clause for clause in joined if clause is not None}


def _joined(literals: Iterable[Boolean]) -> Clause | None:
    """A clause of these literals without those that imply another; None if it always holds."""
    kept: list[Boolean] = []
    for literal in literals:
        if any(_implies(negated(literal), other) for other in kept):
            return None
        if not any(_implies(literal, other) for other in kept):
            kept = [other for other in kept if not _implies(other, literal)] + [literal]
    return frozenset(kept)


def _without_implied(found: set[Clause]) -> set[Clause]:
    """The clauses that no other clause implies."""
    kept: list[Clause] = []
    for clause in found:
        if not any(_clause_implies(other, clause) for other in kept):
            kept = [other for other in kept if not _clause_implies(clause, other)] + [clause]
    return set(kept)


def _clause_implies(clause: Clause, other: Clause) -> bool:
    return all(any(_implies(literal, weaker) for weaker in other) for literal in clause)


def _implies(literal: Boolean, other: Boolean) -> bool:
    """Whether a literal is known to imply another."""
    if isinstance(literal, sympy.Ge) and isinstance(other, sympy.Ge):
        return bool(sympy.expand(other.lhs - literal.lhs).is_nonnegative)
    return literal == other
