"""How operations are read that move elements: views, slices, indexing, concatenation and the dimensions of vmap."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from ..graph.node_values import fake_tensor, is_nonnegative
from ..graph.operations import Permuted
from ..graph.read_operations import read_operation
from .expressions import INTEGERS, Shape, Unreadable, at_least_zero_within, axis, bounds, level
from .handler_tools import dtype_of, flag, index_along, need, symbolic_shape_of
from .reader import Handler, Reader


def _same(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    return reader.operand(input, symbolic_shape_of(node))


def _reshape(reader: Reader, node: Node, input: Any, *_: Any, **__: Any) -> sympy.Basic:
    need(dtype_of(input) == dtype_of(node))
    old, new = reader.read(input), symbolic_shape_of(node)
    before, after = ([n for n, size in enumerate(shape) if size != 1] for shape in (old.shape, new))
    need([old.shape[n] for n in before] == [new[n] for n in after])
    moved = {axis(len(old.shape) - b): axis(len(new) - a) for b, a in zip(before, after, strict=True)}
    return old.expression.xreplace(moved)


def _permute(reader: Reader, node: Node, *_: Any, **__: Any) -> sympy.Basic:
    operation = read_operation(node)
    if not isinstance(operation, Permuted):
        raise Unreadable
    old = reader.read(operation.source)
    rank = len(old.shape)
    return old.expression.xreplace({axis(rank - dim): axis(rank - n) for n, dim in enumerate(operation.order)})


def _concatenated(reader: Reader, node: Node, tensors: Any, dim: Any = 0) -> sympy.Basic:
    """Booleans one after another along `dim`."""
    shape = symbolic_shape_of(node)
    need(dtype_of(node) == torch.bool)
    place = index_along(shape, dim)
    found, start = [], sympy.Integer(0)
    for tensor in tensors:
        end = start + symbolic_shape_of(tensor)[dim]
        part = flag(reader.read(tensor).expression).xreplace({place: place - start})
        # Elsewhere a leaf has no such index.
        need(not part.atoms(AppliedUndef))
        inside = [at_least_zero_within(place - start, shape), at_least_zero_within(end - 1 - place, shape)]
        found.append(sympy.And(*inside, part))
        start = end
    return sympy.Or(*found)


def _add_batch_dim(reader: Reader, node: Node, input: Any, dim: Any, number: Any) -> sympy.Basic:
    """The elements along the first dimension, which vmap hides from here on."""
    old = reader.read(input)
    need(dim == 0)
    return old.expression.xreplace({axis(len(old.shape)): level(number)})


def _remove_batch_dim(reader: Reader, node: Node, input: Any, number: Any, size: Any, dim: Any) -> sympy.Basic:
    """The elements along all dimensions, of which the first is the one that vmap hid."""
    need(dim == 0)
    return reader.read(input).expression.xreplace({level(number): axis(len(symbolic_shape_of(node)))})


def _getitem(reader: Reader, node: Node, source: Any, index: Any) -> sympy.Basic:
    need(fake_tensor(source) is not None)
    old = reader.read(source)
    items = index if isinstance(index, tuple) else (index,)
    new = symbolic_shape_of(node)
    if any(fake_tensor(item) is not None for item in items):
        return old.expression.xreplace(_gathered(reader, items, old.shape, new))
    return old.expression.xreplace(_sliced(reader, _without_ellipsis(items, len(old.shape)), old.shape, new))


def _index(reader: Reader, node: Node, input: Any, indices: Any) -> sympy.Basic:
    return _getitem(reader, node, input, tuple(indices))


def _slice(
    reader: Reader, node: Node, input: Any, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1
) -> sympy.Basic:
    return _along_dimension(reader, node, input, dim, slice(start, end, step))


def _select(reader: Reader, node: Node, input: Any, dim: Any, index: Any) -> sympy.Basic:
    return _along_dimension(reader, node, input, dim, index)


def _along_dimension(reader: Reader, node: Node, input: Any, dim: Any, item: Any) -> sympy.Basic:
    """A tensor indexed along one dimension."""
    rank = len(symbolic_shape_of(input))
    need(isinstance(dim, int) and rank > 0)
    items = [slice(None)] * rank
    items[dim] = item
    return _getitem(reader, node, input, tuple(items))


def _gathered(reader: Reader, items: tuple[Any, ...], old: Shape, new: Shape) -> dict[sympy.Basic, sympy.Basic]:
    need(all(dtype_of(item) in INTEGERS for item in items))
    # What is not indexed keeps its place from the right, unless an index has dimensions of its own.
    need(len(items) == len(old) or not any(map(symbolic_shape_of, items)))
    places: dict[sympy.Basic, sympy.Basic] = {}
    for n, item in enumerate(items):
        place = reader.integers(item, new)
        ends = bounds(place, new)
        # A negative index counts from the end.
        need(bool(place.is_nonnegative) or (ends is not None and bool(ends[0].is_nonnegative)))
        places[axis(len(old) - n)] = place
    return places


def _without_ellipsis(items: tuple[Any, ...], rank: int) -> list[Any]:
    taken = sum(item is not None and item is not Ellipsis for item in items)
    need(taken <= rank)
    missing = [slice(None)] * (rank - taken)
    if Ellipsis not in items:
        return [*items, *missing]
    at = items.index(Ellipsis)
    return [*items[:at], *missing, *items[at + 1 :]]


def _sliced(reader: Reader, items: list[Any], old: Shape, new: Shape) -> dict[sympy.Basic, sympy.Basic]:
    places: dict[sympy.Basic, sympy.Basic] = {}
    source = target = 0
    for item in items:
        if item is None:
            target += 1
            continue
        symbol, size = axis(len(old) - source), old[source]
        source += 1
        if isinstance(item, slice):
            step = 1 if item.step is None else item.step
            need(isinstance(step, int))
            places[symbol] = _position(reader, item.start or 0, size) + step * axis(len(new) - target)
            target += 1
        else:
            places[symbol] = _position(reader, item, size)
    return places


def _position(reader: Reader, index: Any, size: sympy.Expr) -> sympy.Expr:
    need(not isinstance(index, bool))
    place = reader.integer(index)
    if place.is_negative:
        place = size + place
    need(bool(place.is_nonnegative) or is_nonnegative(index))
    return place


HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "clone", "contiguous", "detach"), _same),
    **dict.fromkeys(("view", "reshape", "unsqueeze", "squeeze"), _reshape),
    **dict.fromkeys(("transpose", "permute", "getattr", "numpy_T", "mT", "t"), _permute),
    **dict.fromkeys(("swapaxes", "swapdims", "movedim", "moveaxis"), _permute),
    "getitem": _getitem,
    "index": _index,
    "slice": _slice,
    "select": _select,
    **dict.fromkeys(("cat", "concat", "concatenate"), _concatenated),
    "_add_batch_dim": _add_batch_dim,
    "_remove_batch_dim": _remove_batch_dim,
}
"""The handlers by the names of operations."""
