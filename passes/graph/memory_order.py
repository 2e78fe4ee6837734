"""The order of a tensor's dimensions in memory, and whether the users of a tensor depend on it."""

from __future__ import annotations

import functools

import torch
from torch.fx import Node

from .node_values import fake_tensor
from .operation_names import operation_name
from .torch_internals import guard_or_false

_LAYOUTS = {"transpose", "permute", "swapaxes", "movedim", "to", "float", "half", "bfloat16"}
_VIEWING = {"reshape", "flatten"}
"""Operations that copy only where they cannot view, as they can where sizes are 1."""
_STORING = _VIEWING | {"contiguous", "matmul", "linear", "einsum"}


def memory_order(tensor: torch.Tensor) -> list[int]:
    """The dimensions of a tensor as they lie in memory, outermost first."""
    strides = tensor.stride()

    def compare(one: int, other: int) -> int:
        return guard_or_false(strides[one] < strides[other]) - guard_or_false(strides[one] > strides[other])

    places = list(range(tensor.dim()))
    return places if tensor.is_contiguous() else sorted(places, key=functools.cmp_to_key(compare))


def is_independent_of_strides(node: Node) -> bool:
    """Whether all users of a tensor, through transposes, copy its elements or multiply with it."""
    for user in node.users:
        name = operation_name(user)
        if name in _LAYOUTS and not is_independent_of_strides(user):
            return False
        if name not in _LAYOUTS | _STORING or (name in _VIEWING and not _is_contiguous(user)):
            return False
    return True


def _is_contiguous(node: Node) -> bool:
    tensor = fake_tensor(node)
    return tensor is not None and tensor.is_contiguous()
