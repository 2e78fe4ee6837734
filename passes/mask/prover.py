"""Proves what an attention mask says, from the part of the graph that builds it.

A mask is read as a predicate over batch b, head h, query i and key j, and split into the terms that the operator
has itself: ``j <= i + c``, ``i - j < w``, ``pad[b, j]`` and ``doc[b, i] == doc[b, j]``. The rest of it, if any, is
passed as a boolean mask.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ...ops.validation import dtype_name
from ..graph.mutation import Writes
from ..graph.node_values import fake_tensor, holds, symbolic_shape, why_unknown
from ..graph.torch_internals import Min
from .clauses import Clause, TooMany, at_least_zero, clauses, is_zero
from .empty_rows import EmptyRows, Hiding, every_query_sees_a_key, of_finite_masks
from .handlers import HANDLERS
from .packing import with_indices_for_positions
from .reader import BATCH, HEAD, KEY, QUERY, Reader, Unreadable, as_choice, at_least_zero_within, axis, level, where

AXES = (BATCH, HEAD, QUERY, KEY)
_MAPPED_AXES = tuple(map(level, range(1, 9)))
OTHER_AXES = tuple(axis(place) for place in range(5, 13))
HIDDEN = -9984.0
"""Added to scores, or put in their place, numbers from here down hide a key; it is what bfloat16 makes of -1e4."""
VAST = 2**40
"""Numbers that a mask depends on, such as windows, are smaller."""


class NotProven(Exception):
    """A mask says what the operator cannot, or nothing that can be read; the message is the reason."""


@dataclass(frozen=True)
class MaskTerm:
    """One of the masks of an attention.

    Attributes:
        node: A boolean mask, or one that is added to the scores.
        user: The node that reads it.
        axes: The index along each of its dimensions: one of `AXES`, or of `OTHER_AXES` where it is none of these.
        keep: Whether keys are hidden where a boolean mask is false, or where it is true; None if it is added.
        value: What hidden scores become, or what an added mask is multiplied by; None if that is not known.
        least: What lesser scores are raised to afterwards.
    """

    node: Node
    user: Node
    axes: tuple[sympy.Symbol, ...]
    keep: bool | None
    value: float | None
    least: float = -math.inf


@dataclass(frozen=True)
class Mask:
    """What a mask says: the terms that all hold where a query may see a key, as expressions over `AXES`.

    Attributes:
        is_causal: Whether there is a term ``j <= i + c``.
        offset: That c; without the term, the c of the window's.
        window: The w of a term ``i + c - j < w``, at least 1; None without one.
        key_padding: A predicate over batch and key.
        documents: Two whole numbers, over batch and query and over batch and key, that are equal.
        rest: A predicate that is none of these.
        empty_rows: What queries get that see no key.
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


class Prover:
    """Proves the masks of one graph, reading each node once."""

    def __init__(self, writes: Writes) -> None:
        self.reader = Reader(HANDLERS)
        self._careful = self.reader.without(lambda node: bool(writes.to(node)))
        self._writes = writes

    def prove(self, masks: Iterable[MaskTerm], query: torch.Tensor, key: torch.Tensor, has_sinks: bool = False) -> Mask:
        """What the masks of an attention say together.

        Args:
            masks: The masks, all of which hold.
            query: The query's fake tensor [B, Hq, Lq, D].
            key: The key's fake tensor [B, Hkv, Lk, D].
            has_sinks: Whether the softmax has a logit more, which then is all that queries see that see no key.

        Raises:
            NotProven: They cannot be read, or add something else to the scores than 0 or a number that hides, or leave
                queries that see no key with what the operator cannot give.
        """
        masks = list(masks)
        allowed = [self._allowed(mask) for mask in masks]
        found = self._clauses(sympy.And(*(predicate for predicate, _ in allowed)), query, key)
        hidden = [hiding for predicate, hiding in allowed if predicate != sympy.true]
        mask = self._mask(found, query)
        if not _hidden_rows_are_marked(mask.rest, masks):
            raise NotProven("the mask hides all keys of some queries by a finite number; hide them with -inf")
        finite = any(hiding.value != -math.inf for hiding in hidden) and not has_sinks
        if finite and found and not every_query_sees_a_key(found, scores_shape(query, key), query):
            return replace(mask, empty_rows=_empty_rows(mask, hidden))
        return mask

    def prove_mask_mod(self, predicate: Boolean, query: torch.Tensor, key: torch.Tensor) -> Mask:
        """What a predicate over `AXES` says that is never a tensor over queries and keys, so none is made of it.

        Raises:
            NotProven: The operator would need one.
        """
        mask = self._mask(self._clauses(predicate, query, key), query)
        if {QUERY, KEY} <= mask.rest.free_symbols:
            raise NotProven(
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
            raise NotProven(f"the mask cannot be read: {unreadable}") from None
        except TooMany:
            raise NotProven("the mask combines more conditions than can be told apart; build it from fewer") from None
        found = [clause for clause in parts if clause is not None]
        _refuse_vast_numbers(found, shape, query)
        return found

    def _mask(self, found: Iterable[Clause], query: torch.Tensor) -> Mask:
        """What clauses say that all hold."""
        split = _split(found, query)
        return replace(split, sources=self._sources_in_words(split))

    def _allowed(self, mask: MaskTerm) -> tuple[Boolean, Hiding]:
        """Where a mask lets a query see a key, as a predicate over `AXES`, and what hides it elsewhere."""
        tensor = fake_tensor(mask.node)
        if tensor is None:
            kind = why_unknown(mask.node)
            raise NotProven(f"the mask is {kind}" if kind else "the shape of the mask is not known while compiling")
        if mask.keep is not None and tensor.dtype != torch.bool:
            raise NotProven(f"the mask is {dtype_name(tensor.dtype)}, not boolean; use a boolean mask to fill scores")
        expression = _read(self.reader, mask.node)
        if self._is_changed(mask):
            writers = self._writes.to(mask.node)
            if writers and (tensor.dtype != torch.bool or any(mask.user < writer for writer in writers)):
                if mask.keep is None and not writers[0] < mask.user:
                    _where_nothing_is_added(mask, expression)
                raise NotProven(f"the mask {_origin(mask.node)} is changed in place; build it without that")
            expression = _read(self._careful, mask.node)
        if mask.keep is None:
            predicate, hidden = _where_nothing_is_added(mask, expression)
        else:
            if mask.value is None or not mask.value <= HIDDEN:
                raise NotProven(f"masked scores become {_number(mask.value)}, which hides no key; fill them with -inf")
            predicate, hidden = expression if mask.keep else sympy.Not(expression), mask.value
        if mask.least > HIDDEN:
            raise NotProven(f"masked scores become {_number(mask.least)}, which hides no key; fill them with -inf")
        rank = tensor.dim()
        predicate = predicate.xreplace({axis(rank - place): symbol for place, symbol in enumerate(mask.axes)})
        if predicate.free_symbols & {*_MAPPED_AXES}:
            raise NotProven(f"the mask {_origin(mask.node)} is another for each of what torch.vmap maps over")
        if predicate.free_symbols & {*OTHER_AXES}:
            raise NotProven(f"the mask {_origin(mask.node)} varies over another dimension than batch, heads and keys")
        scores = fake_tensor(mask.user)
        return predicate, Hiding.of(hidden, None if mask.keep is not None else scores, mask.least)

    def _is_changed(self, mask: MaskTerm) -> bool:
        """Whether something that a mask is read from holds something else when it is read."""
        sources = self.reader.sources(mask.node)
        for node in sources:
            writers = self._writes.to(node)
            readers = [user for user in node.users if user in sources] + [mask.user] * (node is mask.node)
            is_leaf = node not in self.reader.understood
            if any(is_leaf or node < writer < reader for writer in writers for reader in readers):
                return True
        return False

    def _leaves(self, *expressions: sympy.Basic) -> list[Node]:
        """The leaves of expressions, in the order of the graph."""
        terms = set().union(*(expression.atoms(AppliedUndef) for expression in expressions))
        return sorted({self.reader.leaves[term.func.__name__] for term in terms})

    def _refuse_other_devices(self, predicate: Boolean, device: torch.device) -> None:
        for node in self._leaves(predicate):
            tensor = fake_tensor(node)
            if tensor is not None and tensor.device != device:
                raise NotProven(f"the mask depends on {_origin(node)}, which is on another device than the query")

    def _sources_in_words(self, mask: Mask) -> tuple[tuple[str, str], ...]:
        terms = {"key padding": (mask.key_padding,), "documents": mask.documents or (), "boolean mask": (mask.rest,)}
        words = {name: " and ".join(dict.fromkeys(map(_origin, self._leaves(*parts)))) for name, parts in terms.items()}
        return tuple(words.items())


def scores_shape(query: torch.Tensor, key: torch.Tensor) -> tuple[sympy.Expr, ...]:
    """The shape [B, Hq, Lq, Lk] of the scores of a query [B, Hq, Lq, D] and a key [B, Hkv, Lk, D]."""
    return (*symbolic_shape(query)[:3], symbolic_shape(key)[2])


def _read(reader: Reader, node: Node) -> sympy.Basic:
    """What a mask holds."""
    try:
        return reader.read(node).expression
    except Unreadable as unreadable:
        raise NotProven(f"the mask cannot be read: {unreadable}") from None


def _where_nothing_is_added(mask: MaskTerm, expression: sympy.Basic) -> tuple[Boolean, float]:
    """Where an added mask is zero, if it hides keys everywhere else, and what it adds there."""
    content = NotProven(
        f"scores get an additive bias with content, {_origin(mask.node)}, such as ALiBi or relative positions; "
        "only masks that add 0, or -inf to hide a key, can be proven; compute it from a boolean"
    )
    choice = as_choice(expression)
    if choice is None or mask.value is None:
        raise content
    added = [float(value) * mask.value for value in choice.values]
    if not all(value == 0 or value <= HIDDEN for value in added):
        raise content
    hidden = max((value for value in added if value != 0), default=-math.inf)
    return where(choice, lambda value: value == 0), hidden


def _within(clause: Clause, shape: tuple[sympy.Expr, ...]) -> Clause | None:
    """A clause without the literals that hold nowhere in a shape; None if it holds everywhere."""
    literals = [
        at_least_zero_within(literal.lhs, shape) if isinstance(literal, sympy.Ge) else literal for literal in clause
    ]
    if sympy.true in literals:
        return None
    return frozenset(literal for literal in literals if literal != sympy.false)


def _refuse_vast_numbers(found: Iterable[Clause], shape: tuple[sympy.Expr, ...], query: torch.Tensor) -> None:
    """Raise NotProven for a number that is only known when the graph runs and so large that sums might overflow."""
    sizes = set().union(*(size.free_symbols for size in shape))
    literals = [literal for clause in found for literal in clause]
    for symbol in set().union(*(literal.free_symbols for literal in literals)) - sizes - {*AXES, *OTHER_AXES}:
        if holds(symbol - VAST, query) or holds(-symbol - VAST, query):
            raise NotProven(f"the mask depends on a number, {symbol}, beyond {VAST}")


def _split(found: Iterable[Clause], query: torch.Tensor) -> Mask:
    """The operator's terms that clauses are, and the rest of them."""
    offsets: list[sympy.Expr] = []
    distances: list[sympy.Expr] = []
    documents: tuple[sympy.Expr, sympy.Expr] | None = None
    padding, rest = [], []
    for clause in sorted(found, key=str):
        if not clause:
            raise NotProven("the mask hides every key from every query")
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
        raise NotProven(f"the mask shows each query {window} keys, which may be none")
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


def _hidden_rows_are_marked(rest: Boolean, masks: list[MaskTerm]) -> bool:
    """Whether queries that see nothing for a reason of their own give zeros, or else there are none."""
    by_query = any(KEY not in part.free_symbols for part in sympy.And.make_args(rest) if part != sympy.true)
    return not by_query or all(mask.keep is not None and mask.value == -math.inf for mask in masks)


def _empty_rows(mask: Mask, hidden: Sequence[Hiding]) -> EmptyRows:
    """What queries get that see no key.

    Raises:
        NotProven: Something that the operator cannot give.
    """
    found = of_finite_masks(hidden)
    is_padding = not mask.is_causal and mask.window is None and mask.documents is None and mask.rest == sympy.true
    if found is None or (found is EmptyRows.UNMASKED and not is_padding):
        raise NotProven(
            "the mask may hide all keys of a query by a finite number, which leaves weights that are no zeros; "
            "use one mask of -inf, or of torch.finfo(dtype).min"
        )
    return found


def _number(value: float | None) -> str:
    return "a value that is not known or changed in place" if value is None else f"{value:g}"


def _origin(node: Node) -> str:
    """A node in words: an input of the graph, or the operation that computes it."""
    if node.op == "placeholder":
        return f"input {node.name.strip('_').removeprefix('l_').removeprefix('kwargs_')}"
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"the result of {operation}"
