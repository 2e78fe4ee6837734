"""Positions inside packed documents, where the documents are told from the positions.

transformers packs sequences so: a document begins where positions do not go up by one, ``documents = cumsum(diff(p) !=
1)``, and a query sees the keys of its document whose positions are not after its own. Inside a document positions go
up by one at each step, so ``p[i] - p[j]`` is ``i - j`` there.
"""

from __future__ import annotations

from collections.abc import Iterable

import sympy
from sympy.core.function import AppliedUndef
from torch.fx import Node

from ..graph.node_values import are_tensors
from ..graph.operation_names import operation_name
from .clauses import Clause, literal_of
from .expressions import axis
from .reader import Reader


def with_indices_for_positions(found: Iterable[Clause], reader: Reader) -> list[Clause]:
    """Clauses that all hold, with differences of indices in place of differences of positions in one document."""
    clauses = list(found)
    for literal in [next(iter(clause)) for clause in clauses if len(clause) == 1]:
        pair = _pair(literal)
        positions = None if pair is None else _positions(reader.leaves[pair[0].func.__name__], reader)
        if pair is not None and positions is not None:
            places = {_at(positions, leaf): leaf.args[-1] for leaf in pair}
            clauses = [frozenset(_replaced(literal, places) for literal in clause) for clause in clauses]
    return clauses


def _pair(literal: sympy.Basic) -> tuple[AppliedUndef, AppliedUndef] | None:
    """The two leaves of a literal ``f(b, i) == f(b, j)``; None if it is something else."""
    leaves = sorted(literal.atoms(AppliedUndef), key=str)
    if not isinstance(literal, sympy.Eq) or len(leaves) != 2 or leaves[0].func != leaves[1].func:
        return None
    is_difference = literal.lhs in (leaves[0] - leaves[1], leaves[1] - leaves[0])
    same = leaves[0].args[:-1] == leaves[1].args[:-1] and all(leaf.args[-1].is_Symbol for leaf in leaves)
    return (leaves[0], leaves[1]) if is_difference and same else None


def _positions(documents: Node, reader: Reader) -> sympy.Basic | None:
    """The positions, if a node counts along its last axis where they do not go up by one."""
    steps = _source(documents, "cumsum", -1)
    difference = None if steps is None else _source(steps, "ne", 1)
    if difference is None or operation_name(difference) != "diff" or not are_tensors(difference.kwargs.get("prepend")):
        return None
    if difference.kwargs.keys() - {"dim", "prepend"} or difference.kwargs.get("dim", -1) != -1:
        return None
    source = difference.args[0]
    if len(difference.args) != 1 or not isinstance(source, Node) or not are_tensors(source):
        return None
    reading = reader.read(source)
    has_shape = reading.shape == reader.read(documents).shape
    return reading.expression if has_shape and isinstance(reading.expression, AppliedUndef) else None


def _source(node: Node, name: str, argument: int) -> Node | None:
    """The tensor that an operation is called with besides one number, if it is of this name and number."""
    values = (*node.args[1:], *node.kwargs.values())
    source = node.args[0] if node.args else None
    return source if operation_name(node) == name and values == (argument,) and isinstance(source, Node) else None


def _at(positions: sympy.Basic, leaf: AppliedUndef) -> sympy.Basic:
    """The positions at the indices of a leaf of the same shape."""
    rank = len(leaf.args)
    return positions.xreplace({axis(rank - place): index for place, index in enumerate(leaf.args)})


def _replaced(literal: sympy.Basic, places: dict[sympy.Basic, sympy.Expr]) -> sympy.Basic:
    """A literal with indices for positions, if it is of their difference alone."""
    if not isinstance(literal, sympy.Ge) or sum(literal.lhs.coeff(position) for position in places) != 0:
        return literal
    rest = literal.lhs.xreplace(dict.fromkeys(places, sympy.Integer(0)))
    is_linear = sympy.expand(literal.lhs - rest - sum(literal.lhs.coeff(p) * p for p in places)) == 0
    return literal_of(literal.xreplace(places)) if is_linear else literal
