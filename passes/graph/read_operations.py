"""Reads nodes as operations in their normal form."""

from __future__ import annotations

import inspect
import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import Node

from .node_values import are_tensors, constant, fake_tensor, objects, symbolic_shape
from .operation_names import operation_name, out_of_place
from .operations import (
    Clamped,
    Cleaned,
    Concatenated,
    Dropout,
    Expanded,
    Filled,
    LogSoftmax,
    Narrowed,
    Operation,
    Permuted,
    Product,
    Repeated,
    Same,
    Scaled,
    Softmax,
    Sum,
    Tanh,
    Viewed,
)

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_operation(node: Node) -> Operation | None:
    """The operation that computes a node; an in-place one as the operation whose result it stores."""
    name = operation_name(node)
    if name is None or "out" in node.kwargs:
        return None
    handler = _HANDLERS.get(out_of_place(name))
    if handler is None or fake_tensor(node) is None or not all(map(_is_known, node.all_input_nodes)):
        return None
    try:
        inspect.signature(handler).bind(node, *node.args, **node.kwargs)
    except TypeError:
        return None
    return handler(node, *node.args, **node.kwargs)


def _is_known(node: Node) -> bool:
    """Whether a node holds a number, or a tensor that is known."""
    return fake_tensor(node) is not None or not objects(node)


def _rank(node: Any) -> int:
    tensor = fake_tensor(node)
    return 0 if tensor is None else tensor.dim()


def _matmul(node: Node, input: Node, other: Node) -> Operation | None:
    ranks = _rank(input), _rank(other)
    if min(ranks) < 2:
        return None
    batch = string.ascii_lowercase[: max(ranks) - 2]
    left, right = (batch[len(batch) + 2 - rank :] for rank in ranks)
    return Product(input, other, f"{left}XY", f"{right}YZ", f"{batch}XZ")


def _bmm(node: Node, input: Node, mat2: Node) -> Operation | None:
    return _matmul(node, input, mat2)


def _baddbmm(node: Node, input: Node, batch1: Node, batch2: Node, *, beta: Any = 1, alpha: Any = 1) -> Operation | None:
    return Product(batch1, batch2, "aXY", "aYZ", "aXZ", alpha, input, beta)


def _einsum(node: Node, equation: Any, *operands: Any) -> Operation | None:
    if not isinstance(equation, str):
        equation, operands = _with_letters(equation, *operands)
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = tuple(operands[0])
    terms, arrow, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(names) != 2 or len(operands) != 2 or (not arrow and "..." in terms):
        return None
    if not arrow:
        result = "".join(sorted(axis for axis in set(terms) - {","} if terms.count(axis) == 1))
    left, right = (_without_ellipsis(name, _rank(operand)) for name, operand in zip(names, operands, strict=True))
    result = _without_ellipsis(result, _rank(node))
    return _product(*operands, left, right, result)


def _with_letters(*arguments: Any) -> tuple[str, tuple[Any, ...]]:
    """The equation and operands of an einsum whose axes are lists of numbers, each after its operand."""
    letters = ["".join("..." if n is Ellipsis else string.ascii_letters[n] for n in axes) for axes in arguments[1::2]]
    operands = arguments[: len(letters) * 2 : 2]
    result = arguments[-1] if len(arguments) % 2 else None
    named = "".join("..." if n is Ellipsis else string.ascii_letters[n] for n in result or ())
    return ",".join(letters) + ("" if result is None else f"->{named}"), operands


def _without_ellipsis(axes: str, rank: int) -> str:
    """Axes with digits, counted from the right, in place of an ellipsis."""
    digits = string.digits[::-1]
    missing = rank - len(axes.replace("...", ""))
    return axes.replace("...", digits[len(digits) - missing :])


def _product(left: Node, right: Node, left_axes: str, right_axes: str, axes: str) -> Operation | None:
    summed = (set(left_axes) | set(right_axes)) - set(axes)
    distinct = all(len(set(names)) == len(names) for names in (left_axes, right_axes, axes))
    if not distinct or not summed <= set(left_axes) & set(right_axes):
        return None
    return Product(left, right, left_axes, right_axes, axes)


def _softmax(node: Node, input: Node, dim: Any = None, *_: Any, axis: Any = None, **__: Any) -> Operation | None:
    dim = axis if dim is None else dim
    return Softmax(input, dim % _rank(node)) if isinstance(dim, int) and _rank(node) else None


def _log_softmax(node: Node, input: Node, dim: Any = None, *_: Any, **__: Any) -> Operation | None:
    return LogSoftmax(input, dim % _rank(node)) if isinstance(dim, int) and _rank(node) else None


def _mul(node: Node, input: Any, other: Any) -> Operation | None:
    return Scaled(input, other)


def _div(node: Node, input: Any, other: Any, *, rounding_mode: Any = None) -> Operation | None:
    return Scaled(input, other, inverted=True) if rounding_mode is None else None


def _add(node: Node, input: Any, other: Any, *, alpha: Any = 1) -> Operation | None:
    return Sum(input, other) if alpha == 1 else None


def _sub(node: Node, input: Any, other: Any, *, alpha: Any = 1) -> Operation | None:
    return Sum(input, other, -1) if alpha == 1 else None


def _masked_fill(node: Node, input: Node, mask: Node, value: Any) -> Operation | None:
    return Filled(input, mask, value, keep=False)


def _where(node: Node, condition: Node, input: Any, other: Any) -> Operation | None:
    if node.op == "call_method":
        condition, input = input, condition
    return Filled(input, condition, other, keep=True)


def _same(node: Node, input: Node, *_: Any, **__: Any) -> Operation | None:
    old, new = fake_tensor(input), fake_tensor(node)
    if old is None or new is None or old.device != new.device:
        return None
    return Same(input) if old.dtype in _FLOATS and new.dtype in _FLOATS else None


def _nan_to_num(node: Node, input: Node, nan: Any = 0.0) -> Operation | None:
    return Cleaned(input) if nan in (0.0, None) else None


def _maximum(node: Node, input: Node, other: Node) -> Operation | None:
    return Clamped(input, other) if are_tensors(input, other) else None


def _clamp(node: Node, input: Node, min: Any = None) -> Operation | None:
    return Clamped(input, min)


def _tanh(node: Node, input: Node) -> Operation | None:
    return Tanh(input)


def _cat(node: Node, tensors: Any, dim: Any = 0) -> Operation | None:
    if not isinstance(tensors, (tuple, list)) or not isinstance(dim, int) or not are_tensors(*tensors):
        return None
    return Concatenated(tuple(tensors), dim % _rank(node))


def _dropout(
    node: Node, input: Node, p: Any = 0.5, training: Any = True, inplace: Any = False, train: Any = True
) -> Operation | None:
    return Same(input) if constant(p) == 0 or training is False or train is False else Dropout(input)


def _view(node: Node, input: Node, *_: Any, **__: Any) -> Operation | None:
    old, new = fake_tensor(input), fake_tensor(node)
    return Viewed(input) if old is not None and new is not None and old.dtype == new.dtype else None


def _getitem(node: Node, input: Node, index: Any) -> Operation | None:
    items = index if isinstance(index, tuple) else (index,)
    parts = [item for item in items if item is not None and item is not Ellipsis and item != slice(None)]
    if not parts:
        return _view(node, input)
    (part,) = parts if len(parts) == 1 and None not in items else (None,)
    if not isinstance(part, slice) or part.step is not None or not isinstance(part.start or 0, int):
        return None
    place = items.index(part)
    dim = place - len(items) if Ellipsis in items[:place] else place
    start = part.start or 0
    return Narrowed(input, dim % _rank(input), start) if start >= 0 and _rank(input) else None


def _permuted(input: Node, order: Sequence[Any]) -> Operation | None:
    rank = _rank(input)
    if len(order) != rank or not all(isinstance(dim, int) for dim in order):
        return None
    return Permuted(input, tuple(dim % rank for dim in order))


def _permute(node: Node, input: Node, *dims: Any, **named: Any) -> Operation | None:
    order = named.get("dims", dims)
    return _permuted(input, order[0] if len(order) == 1 and isinstance(order[0], (tuple, list)) else order)


def _transpose(node: Node, input: Node, dim0: Any, dim1: Any) -> Operation | None:
    order = list(range(_rank(input)))
    if not order or not isinstance(dim0, int) or not isinstance(dim1, int):
        return None
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permuted(input, order)


def _swapaxes(node: Node, input: Node, axis0: Any, axis1: Any) -> Operation | None:
    return _transpose(node, input, axis0, axis1)


def _t(node: Node, input: Node) -> Operation | None:
    return _permuted(input, (1, 0))


def _matrix_transpose(node: Node, input: Node) -> Operation | None:
    return _transpose(node, input, -2, -1)


def _reversed(node: Node, input: Node) -> Operation | None:
    return _permuted(input, range(_rank(input))[::-1])


def _getattr(node: Node, input: Node, name: str) -> Operation | None:
    handler = _ATTRIBUTES.get(name)
    return None if handler is None else handler(node, input)


def _movedim(node: Node, input: Node, source: Any, destination: Any) -> Operation | None:
    pairs = [dims if isinstance(dims, (tuple, list)) else (dims,) for dims in (source, destination)]
    rank = _rank(input)
    if not rank:
        return None
    moved = {to % rank: dim % rank for dim, to in zip(*pairs, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    return _permuted(input, [moved[place] if place in moved else next(rest) for place in range(rank)])


def _expand(node: Node, input: Node, *_: Any, **__: Any) -> Operation | None:
    return Expanded(input)


def _repeat(node: Node, input: Node, *sizes: Any) -> Operation | None:
    """Repeating only dimensions of size 1 is broadcasting; the layout of anything else is another."""
    old, new = fake_tensor(input), fake_tensor(node)
    if old is None or new is None:
        return None
    pairs = zip(symbolic_shape(old)[::-1], symbolic_shape(new)[::-1], strict=False)
    return Expanded(input) if all(size in (1, repeated) for size, repeated in pairs) else None


def _repeat_interleave(node: Node, input: Node, repeats: Any, dim: Any = None, **_: Any) -> Operation | None:
    if fake_tensor(repeats) is not None or not isinstance(dim, int) or not _rank(input):
        return None
    return Repeated(input, dim % _rank(input))


_ATTRIBUTES = {"T": _reversed, "mT": _matrix_transpose}
_HANDLERS: dict[str, Callable[..., Operation | None]] = {
    "matmul": _matmul,
    "bmm": _bmm,
    "mm": _bmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    **dict.fromkeys(("softmax", "_safe_softmax"), _softmax),
    "log_softmax": _log_softmax,
    **dict.fromkeys(("mul", "multiply"), _mul),
    **dict.fromkeys(("div", "divide", "truediv", "true_divide"), _div),
    "add": _add,
    **dict.fromkeys(("sub", "subtract"), _sub),
    "masked_fill": _masked_fill,
    "where": _where,
    "nan_to_num": _nan_to_num,
    **dict.fromkeys(("max", "maximum"), _maximum),
    **dict.fromkeys(("clamp", "clamp_min", "clip"), _clamp),
    "tanh": _tanh,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    "dropout": _dropout,
    **dict.fromkeys(("to", "type", "type_as", "float", "half", "bfloat16", "double"), _same),
    **dict.fromkeys(("contiguous", "clone", "detach", "alias"), _same),
    **dict.fromkeys(("view", "reshape", "view_as", "reshape_as", "flatten", "unflatten"), _view),
    **dict.fromkeys(("unsqueeze", "squeeze"), _view),
    "getitem": _getitem,
    "getattr": _getattr,
    "numpy_T": _reversed,
    "mT": _matrix_transpose,
    "permute": _permute,
    "transpose": _transpose,
    **dict.fromkeys(("swapaxes", "swapdims"), _swapaxes),
    "t": _t,
    **dict.fromkeys(("movedim", "moveaxis"), _movedim),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
}
