"""A proven mask: the terms of the operator that it consists of, and the rest of it.

The terms are ``j <= i + c``, ``i - j < w``, ``pad[b, j]`` and ``doc[b, i] == doc[b, j]``; the rest is a boolean mask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean

from ..graph.node_values import holds, symbolic_shape
from ..graph.torch_internals import Min
from .clauses import Clause, at_least_zero, clauses, is_zero
from .empty_rows import EmptyRows, every_query_sees_a_key
from .expressions import AXES, HEAD, KEY, QUERY
from .refused import Refused


@dataclass(frozen=True)
class Mask:
    """A mask as the terms that all hold where a query may see a key, as expressions over `AXES`.

    Attributes:
        is_causal: Whether there is a term ``j <= i + c``.
        offset: That c; without the term, the c of the window's.
        window: The w of a term ``i + c - j < w``, at least 1; None without one.
        key_padding: A predicate over batch and key.
        documents: Two whole numbers, over batch and query and over batch and key, that are equal.
        rest: A predicate that is none of these.
        empty_rows: The output for queries that see no key.
        sources: The inputs and operations that the predicates depend on, in words.
    """

    is_causal: bool = False
    offset: sympy.Expr = sympy.S.Zero
    window: sympy.Expr | None = None
    key_padding: Boolean = sympy.true
    documents: tuple[sympy.Expr, sympy.Expr] | None = None
    rest: Boolean = sympy.true
    empty_rows: EmptyRows = EmptyRows.ZEROS
    sources: tuple[tuple[str, str], ...] = ()

    @property
    def predicate(self) -> Boolean:
        """All terms in one."""
        distance = QUERY + self.offset - KEY
        terms = [self.key_padding, self.rest]
        if self.is_causal:
            terms.append(at_least_zero(distance))
        if self.window is not None:
            terms.append(at_least_zero(self.window - 1 - distance))
        if self.documents is not None:
            terms.append(is_zero(self.documents[0] - self.documents[1]))
        return sympy.And(*terms)

    def shows_each_query_a_key(self, query: torch.Tensor, key: torch.Tensor) -> bool:
        """Whether no query has all its keys hidden; the graph is guarded by what a positive answer depends on.

        Args:
            query: The query's fake tensor [B, Hq, Lq, D].
            key: The key's fake tensor [B, Hkv, Lk, D].
        """
        return every_query_sees_a_key(clauses(self.predicate), scores_shape(query, key), query)

    def __str__(self) -> str:
        terms = [f"causal, offset {self.offset}"] * self.is_causal
        if self.window is not None:
            terms.append(f"window {self.window}" + (f", offset {self.offset}" if not self.is_causal else ""))
        sources = dict(self.sources)
        for name, has_term in (
            ("key padding", self.key_padding != sympy.true),
            ("documents", self.documents is not None),
            ("boolean mask", self.rest != sympy.true),
        ):
            source = sources.get(name)
            terms += [f"{name} from {source}" if source else name] * has_term
        return "; ".join(terms) or "everything"


def terms_of(found: Iterable[Clause], query: torch.Tensor) -> Mask:
    """The mask of clauses that all hold: the operator's terms among them, and the rest.

    Raises:
        Refused: A query sees no key, or may see none.
    """
    offsets: list[sympy.Expr] = []
    distances: list[sympy.Expr] = []
    documents: tuple[sympy.Expr, sympy.Expr] | None = None
    padding, rest = [], []
    for clause in sorted(found, key=str):
        if not clause:
            raise Refused("the mask hides every key from every query")
        predicate = sympy.Or(*clause)
        literal = next(iter(clause)) if len(clause) == 1 else None
        if not predicate.free_symbols & {QUERY, HEAD}:
            padding.append(predicate)
        elif (offset := _bound(literal, KEY - QUERY)) is not None:
            offsets.append(offset)
        elif (distance := _bound(literal, QUERY - KEY)) is not None:
            distances.append(distance)
        elif documents is None and (sides := _documents(literal)) is not None:
            documents = sides
        else:
            rest.append(predicate)
    others = Mask(key_padding=sympy.And(*padding), documents=documents, rest=sympy.And(*rest))
    return _with_band(others, offsets, distances, query)


def _with_band(mask: Mask, offsets: list[sympy.Expr], distances: list[sympy.Expr], query: torch.Tensor) -> Mask:
    """A mask with the terms ``j - i <= offset`` and ``i - j <= distance`` too."""
    offset = Min(*offsets) if offsets else sympy.Integer(0)
    if not distances:
        return replace(mask, is_causal=bool(offsets), offset=offset)
    distance = Min(*distances)
    if not offsets and not holds(distance, query):
        offset = -distance
    window = sympy.expand(distance + offset + 1)
    if not holds(window - 1, query):
        raise Refused(f"the mask shows each query {window} keys, which may be none")
    return replace(mask, is_causal=bool(offsets), offset=offset, window=window)


def _bound(literal: Boolean | None, difference: sympy.Expr) -> sympy.Expr | None:
    """The c of a literal ``difference <= c``; None if it is something else."""
    if not isinstance(literal, sympy.Ge):
        return None
    bound = sympy.expand(literal.lhs + difference)
    return None if bound.atoms(AppliedUndef) or bound.free_symbols & {*AXES} else bound


def _documents(literal: Boolean | None) -> tuple[sympy.Expr, sympy.Expr] | None:
    """The sides of a literal ``f(b, i) == g(b, j)``; None if it is something else."""
    if not isinstance(literal, sympy.Eq) or HEAD in literal.free_symbols:
        return None
    terms = sympy.Add.make_args(literal.lhs)
    of_query = sympy.Add(*(term for term in terms if QUERY in term.free_symbols))
    of_key = sympy.expand(of_query - literal.lhs)
    if KEY in of_query.free_symbols or not of_query.free_symbols & {QUERY} or not of_key.free_symbols & {KEY}:
        return None
    return of_query, of_key


def scores_shape(query: torch.Tensor, key: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The shape [B, Hq, Lq, Lk] of the scores of a query [B, Hq, Lq, D] and a key [B, Hkv, Lk, D]."""
    return (*symbolic_shape(query)[:3], symbolic_shape(key)[2])
