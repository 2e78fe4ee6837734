"""Proves what an attention mask says, from the part of the graph that builds it.

A mask is read as a predicate over batch b, head h, query i and key j, and split into the terms that the operator
has itself: ``j <= i + c``, ``i - j < w``, ``pad[b, j]`` and ``doc[b, i] == doc[b, j]``. The rest of it, if any, is
passed as a boolean mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.mutation import Writes
from ..graph.node_values import fake_tensor, holds
from .clauses import Clause, TooManyClauses, clauses
from .empty_rows import EmptyRows, Hiding, every_query_sees_a_key, of_finite_masks
from .expressions import AXES, KEY, OTHER_AXES, QUERY, Unreadable, at_least_zero_within
from .handlers import HANDLERS
from .mask_tensors import MaskReader, MaskTensor, node_in_words
from .packing import with_indices_for_positions
from .reader import Reader
from .refused import Refused
from .terms import Mask, scores_shape, terms_of

_VAST = 2**40
"""Numbers that a mask depends on, such as windows, are smaller."""


class Prover:
    """Proves the masks of one graph, reading each node once."""

    def __init__(self, writes: Writes) -> None:
        self.reader = Reader(HANDLERS)
        self._masks = MaskReader(self.reader, writes)

    def prove(
        self, masks: Sequence[MaskTensor], query: torch.Tensor, key: torch.Tensor, has_sinks: bool = False
    ) -> Mask:
        """The masks of an attention as one.

        Args:
            masks: The masks, all of which hold.
            query: The query's fake tensor [B, Hq, Lq, D].
            key: The key's fake tensor [B, Hkv, Lk, D].
            has_sinks: Whether the softmax has a logit more, which then is all that queries see that see no key.

        Raises:
            Refused: They cannot be read, or add something else to the scores than 0 or a number that hides, or leave
                queries that see no key with what the operator cannot give.
        """
        allowed = [self._masks.allowed(mask) for mask in masks]
        found = self._clauses(sympy.And(*(predicate for predicate, _ in allowed)), query, key)
        hidden = [hiding for predicate, hiding in allowed if predicate != sympy.true]
        mask = self._mask(found, query)
        if not _hidden_rows_are_marked(mask.rest, masks):
            raise Refused("the mask hides all keys of some queries by a finite number; hide them with -inf")
        finite = any(hiding.value != -math.inf for hiding in hidden) and not has_sinks
        if finite and found and not every_query_sees_a_key(found, scores_shape(query, key), query):
            return replace(mask, empty_rows=_empty_rows(mask, hidden))
        return mask

    def prove_mask_mod(self, predicate: Boolean, query: torch.Tensor, key: torch.Tensor) -> Mask:
        """The mask of a predicate over `AXES` that is never stored for each query and key, and must not be.

        Raises:
            Refused: The operator would need one.
        """
        mask = self._mask(self._clauses(predicate, query, key), query)
        if {QUERY, KEY} <= mask.rest.free_symbols:
            raise Refused(
                "the mask_mod combines query and key otherwise than causal masks, windows and documents do; "
                "the operator would need a boolean for each pair of them, which flex_attention never stores"
            )
        return mask

    def _clauses(self, allowed: Boolean, query: torch.Tensor, key: torch.Tensor) -> list[Clause]:
        """The clauses of a predicate over `AXES` that do not hold everywhere."""
        self._refuse_other_devices(allowed, query.device)
        shape = scores_shape(query, key)
        try:
            parts = [_within(clause, shape) for clause in with_indices_for_positions(clauses(allowed), self.reader)]
        except Unreadable as unreadable:
            raise Refused(f"the mask cannot be read: {unreadable}") from None
        except TooManyClauses:
            raise Refused("the mask combines more conditions than can be told apart; build it from fewer") from None
        found = [clause for clause in parts if clause is not None]
        _refuse_vast_numbers(found, shape, query)
        return found

    def _mask(self, found: Iterable[Clause], query: torch.Tensor) -> Mask:
        """The mask of clauses that all hold."""
        split = terms_of(found, query)
        return replace(split, sources=self._sources_in_words(split))

    def _leaves(self, *expressions: sympy.Basic) -> list[Node]:
        """The leaves of expressions, in the order of the graph."""
        terms = set().union(*(expression.atoms(AppliedUndef) for expression in expressions))
        return sorted({self.reader.leaves[term.func.__name__] for term in terms})

    def _refuse_other_devices(self, predicate: Boolean, device: torch.device) -> None:
        for node in self._leaves(predicate):
            tensor = fake_tensor(node)
            if tensor is not None and tensor.device != device:
                raise Refused(f"the mask depends on {node_in_words(node)}, which is on another device than the query")

    def _sources_in_words(self, mask: Mask) -> tuple[tuple[str, str], ...]:
        terms = {"key padding": (mask.key_padding,), "documents": mask.documents or (), "boolean mask": (mask.rest,)}
        words = {name: dict.fromkeys(map(node_in_words, self._leaves(*parts))) for name, parts in terms.items()}
        return tuple((name, " and ".join(sources)) for name, sources in words.items())


def _within(clause: Clause, shape: tuple[sympy.Expr, ...]) -> Clause | None:
    """A clause without the literals that hold nowhere in a shape; None if it holds everywhere."""
    literals = [
        at_least_zero_within(literal.lhs, shape) if isinstance(literal, sympy.Ge) else literal for literal in clause
    ]
    if sympy.true in literals:
        return None
    return frozenset(literal for literal in literals if literal != sympy.false)


def _refuse_vast_numbers(found: Iterable[Clause], shape: tuple[sympy.Expr, ...], query: torch.Tensor) -> None:
    """Raise Refused for a number that is only known when the graph runs and so large that sums might overflow."""
    sizes = set().union(*(size.free_symbols for size in shape))
    literals = [literal for clause in found for literal in clause]
    for symbol in set().union(*(literal.free_symbols for literal in literals)) - sizes - {*AXES, *OTHER_AXES}:
        if holds(symbol - _VAST, query) or holds(-symbol - _VAST, query):
            raise Refused(f"the mask depends on a number, {symbol}, beyond {_VAST}")


def _hidden_rows_are_marked(rest: Boolean, masks: Iterable[MaskTensor]) -> bool:
    """Whether queries that see nothing for a reason of their own give zeros, or else there are none."""
    by_query = any(KEY not in part.free_symbols for part in sympy.And.make_args(rest) if part != sympy.true)
    return not by_query or all(mask.keep is not None and mask.value == -math.inf for mask in masks)


def _empty_rows(mask: Mask, hidden: Sequence[Hiding]) -> EmptyRows:
    """The output for queries that see no key.

    Raises:
        Refused: Something that the operator cannot give.
    """
    found = of_finite_masks(hidden)
    is_padding = not mask.is_causal and mask.window is None and mask.documents is None and mask.rest == sympy.true
    if found is None or (found is EmptyRows.UNMASKED and not is_padding):
        raise Refused(
            "the mask may hide all keys of a query by a finite number, which leaves weights that are no zeros; "
            "use one mask of -inf, or of torch.finfo(dtype).min"
        )
    return found
