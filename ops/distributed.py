"""Tensors of ``torch.distributed`` that hold a part of what a call attends to."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

_EXPERIMENTAL = "torch.distributed.tensor.experimental"
_PLAIN = (torch.Tensor, type(None))
"""Types of what is surely no DTensor."""
_calls = threading.local()
"""Of this thread: whether they hold the keys of all ranks."""


def in_context_parallel() -> bool:
    """Whether torch's ``context_parallel`` is on, in which each rank holds a part of the sequence.

    It says so nowhere. It puts a function of its own in the place of SDPA, for all threads.
    """
    module = getattr(functional.scaled_dot_product_attention, "__module__", None)
    return isinstance(module, str) and module.startswith(_EXPERIMENTAL)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, which torch imports late."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


@contextmanager
def holding_all_keys() -> Iterator[None]:
    """A context for calls that are given the keys of all ranks, which ``context_parallel`` does not concern."""
    before = getattr(_calls, "hold_all_keys", False)
    _calls.hold_all_keys = True
    try:
        yield
    finally:
        _calls.hold_all_keys = before


def refuse_context_parallel() -> None:
    """Refuse a call inside ``context_parallel`` that is given the keys of one rank, which only SDPA can answer.

    Raises:
        RuntimeError: The call is inside.
    """
    if in_context_parallel() and not getattr(_calls, "hold_all_keys", False):
        raise RuntimeError(
            "s2o.attention cannot run inside torch's context_parallel, where it would attend each rank to its own "
            "tokens only; pass mesh= to it or to s2o_compile.configure, so that it gathers the keys of all ranks, use "
            "SDPA there (attn_implementation='sdpa'), or leave the context"
        )


def validate_placements(**tensors: torch.Tensor | None) -> None:
    """Check where the tensors of a call lie, named as in `ops.operator`, if any is a DTensor.

    Raises:
        TypeError: Some are DTensors, and others are not.
        ValueError: They are sharded in a way that attention would need communication for.
    """
    placed = {name: x for name, x in tensors.items() if type(x) not in _PLAIN and is_dtensor(x)}
    if not placed:
        return
    from .placements import placements_of_inputs
    from .sharding import replicates_plain_tensors

    plain = [name for name, tensor in tensors.items() if tensor is not None and name not in placed]
    if plain and not replicates_plain_tensors():
        raise TypeError(
            f"{plain[0]} must be a DTensor, as {next(iter(placed))} is one: distribute_tensor makes one of a tensor, "
            "and to_local() plain tensors of DTensors"
        )
    if "query" in placed and "key" in placed:
        placements_of_inputs(placed)


def local_shape(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The shape of a tensor; of a DTensor the largest shape of a part, which is the same on all ranks."""
    if not is_dtensor(tensor):
        return tensor.shape
    from .placements import local_shape as largest

    return largest(tensor)


def refuse_dtensors(**tensors: torch.Tensor) -> None:
    """Refuse DTensors, for which an operator has no sharding rule.

    Raises:
        TypeError: A tensor is a DTensor.
    """
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, not a DTensor: call this on the parts that to_local() returns"
            )
