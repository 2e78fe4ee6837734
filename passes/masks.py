"""Proves what an attention mask says, from the part of the graph that builds it.

A mask is read as a predicate over batch b, head h, query i and key j. It is proven when it is a conjunction
of terms that the operator has itself: ``j <= i + c`` and ``pad[b, j]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
from sympy.core.function import AppliedUndef
from sympy.logic.boolalg import Boolean
from torch.fx import Graph, Node

from .mutation import storage, writes
from .symbolic import Reader, Unreadable, as_choice, axis
from .values import fake_tensor, symbolic, symbolic_shape

KEY, QUERY, HEAD, BATCH = (axis(place) for place in range(1, 5))
AXES = (BATCH, HEAD, QUERY, KEY)
OTHER_AXES = tuple(axis(place) for place in range(5, 13))
HIDDEN = -1e4
"""Added to scores, or put in their place, numbers from here down hide a key.

Where a row sees no key at all, scores filled with a finite number give equal weights, while the operator gives zeros;
such a row has no meaning, and SDPA differs there likewise.
"""


class NotProven(Exception):
    """A mask says what the operator cannot, or nothing that can be read; the message is the reason."""


@dataclass(frozen=True)
class MaskTerm:
    """One of the masks of an attention.

    Attributes:
        node: A boolean mask, or one that is added to the scores.
        axes: The index along each of its dimensions: one of `AXES`, or of `OTHER_AXES` where it is none of these.
        keep: Whether keys are hidden where a boolean mask is false, or where it is true; None if it is added.
        value: What hidden scores become, or what an added mask is multiplied by; None if that is not known.
    """

    node: Node
    axes: tuple[sympy.Symbol, ...]
    keep: bool | None
    value: float | None


@dataclass(frozen=True)
class Padding:
    """A term ``pad[b, j]``: ``node[index]`` is [batch, keys] if `per_batch`, else [keys].

    It is true for keys that may be attended, or, where `inverted`, for those that may not.
    """

    node: Node
    index: tuple[int | tuple[int, int] | None, ...]
    per_batch: bool
    inverted: bool


@dataclass(frozen=True)
class Mask:
    """What a mask says: the terms that all hold where a query may see a key.

    Attributes:
        is_causal: Whether query i sees only the keys up to i + `offset`.
        offset: A number, or a node that holds one.
        paddings: The keys that may be attended.
    """

    is_causal: bool = False
    offset: int | Node = 0
    paddings: tuple[Padding, ...] = ()

    def __str__(self) -> str:
        offset = self.offset.name if isinstance(self.offset, Node) else self.offset
        terms = [f"causal, offset {offset}"] if self.is_causal else []
        return "; ".join(terms + ["key padding"] * bool(self.paddings)) or "everything"


class Prover:
    """Proves the masks of one graph, reading each node once."""

    def __init__(self, graph: Graph) -> None:
        self.reader = Reader()
        self._mutated = writes(graph)

    def prove(self, masks: Iterable[MaskTerm], query: torch.Tensor, key: torch.Tensor) -> Mask:
        """What the masks of an attention say together.

        Args:
            masks: The masks, all of which hold.
            query: The query's fake tensor [B, Hq, Lq, D].
            key: The key's fake tensor [B, Hkv, Lk, D].

        Raises:
            NotProven: They are not the conjunction of a causal mask and key padding, as far as they show.
        """
        causal: list[sympy.Expr] = []
        paddings: list[Padding] = []
        last = None
        for mask in masks:
            last = mask.node
            for term in sympy.And.make_args(self._allowed(mask)):
                unknown = term.atoms(AppliedUndef)
                if unknown:
                    paddings.append(_padding(term, unknown.pop(), query, key, self.reader))
                elif term is not sympy.true:
                    causal.append(_causal_offset(term))
        paddings.sort(key=lambda padding: padding.node.name)
        return Mask(bool(causal), _least(causal, last), tuple(dict.fromkeys(paddings)))

    def _allowed(self, mask: MaskTerm) -> sympy.Basic:
        """Where a mask lets a query see a key, as a predicate over `AXES`."""
        tensor = fake_tensor(mask.node)
        if tensor is None:
            raise NotProven("the shape of the mask is not known while compiling")
        if mask.keep is not None and tensor.dtype != torch.bool:
            raise NotProven(f"the mask is {_short(tensor.dtype)}, not boolean; use a boolean mask to fill scores")
        try:
            expression = self.reader.read(mask.node).expression
        except Unreadable as unreadable:
            raise NotProven(f"the mask cannot be read: {unreadable}") from None
        self._refuse_mutated(mask.node)
        if mask.keep is None:
            predicate = _where_nothing_is_added(mask, expression)
        else:
            if mask.value is None or not mask.value <= HIDDEN:
                raise NotProven(f"masked scores become {_number(mask.value)}, which hides no key; fill them with -inf")
            predicate = expression if mask.keep else sympy.Not(expression)
        if predicate.has(sympy.Or):
            raise NotProven(f"the mask {_origin(mask.node)} is a disjunction; only conjunctions are known")
        rank = tensor.dim()
        return predicate.xreplace({axis(rank - place): symbol for place, symbol in enumerate(mask.axes)})

    def _refuse_mutated(self, mask: Node) -> None:
        for node in self._sources(mask):
            tensor = fake_tensor(node)
            if tensor is not None and storage(tensor) in self._mutated:
                raise NotProven(
                    f"the mask depends on {_origin(node)}, which is changed in place; build it without that"
                )

    def _sources(self, mask: Node) -> set[Node]:
        """The nodes that were read for a mask, leaves included."""
        found: set[Node] = set()
        pending = [mask]
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                pending.extend(node.all_input_nodes if node in self.reader.understood else ())
        return found


def _where_nothing_is_added(mask: MaskTerm, expression: sympy.Basic) -> Boolean:
    """Where an added mask is zero, if it hides keys everywhere else."""
    content = NotProven(
        f"scores get an additive bias with content, {_origin(mask.node)}, such as ALiBi or relative positions; "
        "only masks that add 0, or -inf to hide a key, can be proven"
    )
    choice = as_choice(expression)
    if choice is None or mask.value is None:
        raise content
    added = [float(value) * mask.value for value in choice.values]
    if not all(value == 0 or value <= HIDDEN for value in added):
        raise content
    allowed, otherwise = (sympy.true if value == 0 else sympy.false for value in added)
    if allowed == otherwise:
        return allowed
    return choice.predicate if allowed else sympy.Not(choice.predicate)


def _causal_offset(term: sympy.Basic) -> sympy.Expr:
    """The c of a term ``j <= i + c``."""
    if term is sympy.false:
        raise NotProven("the mask hides every key from every query")
    if isinstance(term, (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)):
        difference = term.gts - term.lts - int(isinstance(term, (sympy.Gt, sympy.Lt)))
        offset = sympy.expand(difference - QUERY + KEY)
        if not offset.free_symbols & {*AXES, *OTHER_AXES}:
            return offset
    raise NotProven(
        f"the mask requires {_readable(term)}, where b, h, i and j are batch, head, query and key; "
        "only j <= i + constant and key padding are known"
    )


def _readable(term: sympy.Basic) -> str:
    names = {BATCH: "b", HEAD: "h", QUERY: "i", KEY: "j"}
    return str(term.xreplace({symbol: sympy.Symbol(name) for symbol, name in names.items()}))


def _least(offsets: list[sympy.Expr], mask: Node | None) -> int | Node:
    """The least of the offsets, as an argument for a node of the graph."""
    if not offsets or mask is None:
        return 0
    offset = sympy.Min(*offsets)
    if offset.is_Integer:
        return int(offset)
    for node in mask.graph.nodes:
        if node is mask:
            break
        if symbolic(node) == offset:
            return node
    raise NotProven(f"the mask is causal with the offset {offset}, which the graph does not compute as a number")


def _padding(
    term: sympy.Basic, unknown: AppliedUndef, query: torch.Tensor, key: torch.Tensor, reader: Reader
) -> Padding:
    node = reader.leaves[unknown.func.__name__]
    if term not in (sympy.Ne(unknown, 0), sympy.Eq(unknown, 0)):
        raise NotProven(f"the mask depends on {_origin(node)} in a way that cannot be read")
    if unknown.free_symbols & {QUERY, HEAD}:
        raise NotProven(f"the mask depends on {_origin(node)}, which cannot be read and varies over queries or heads")
    leaf = fake_tensor(node)
    assert leaf is not None
    if leaf.device != query.device:
        raise NotProven(f"the mask depends on {_origin(node)}, which is on another device than the query")
    batch, keys = symbolic_shape(query)[0], symbolic_shape(key)[2]
    index = tuple(
        _place(place, size, batch, keys, node) for place, size in zip(unknown.args, symbolic_shape(leaf), strict=True)
    )
    kept = [place for place in unknown.args if not place.is_Integer]
    if [place.free_symbols & {BATCH, KEY} for place in kept] not in ([{BATCH}, {KEY}], [{KEY}]):
        raise NotProven(f"the mask indexes {_origin(node)} otherwise than by batch and key")
    return Padding(node, index, len(kept) == 2, isinstance(term, sympy.Eq))


def _place(
    place: sympy.Expr, size: sympy.Expr, batch: sympy.Expr, keys: sympy.Expr, node: Node
) -> int | tuple[int, int] | None:
    """One item of a padding's index: a number, a slice as (start, end), or None for the whole dimension."""
    if place.is_Integer:
        return int(place)
    if (place, size) in ((BATCH, batch), (KEY, keys)):
        return None
    start = place - KEY
    if start.is_Integer and keys.is_Integer:
        return int(start), int(start + keys)
    raise NotProven(f"the mask indexes {_origin(node)} by {_readable(place)}, not by batch and key alone")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _number(value: float | None) -> str:
    return "a value that is not known" if value is None else f"{value:g}"


def _origin(node: Node) -> str:
    """A node in words: an input of the graph, or the operation that computes it."""
    if node.op == "placeholder":
        return f"the input {node.name.strip('_')}"
    operation = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
    return f"{node.name} (computed by {operation})"
