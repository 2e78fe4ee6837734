"""Tensors of ``torch.distributed`` that hold a part of what a call attends to."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn import functional

_EXPERIMENTAL = "torch.distributed.tensor.experimental"


def in_context_parallel() -> bool:
    """Whether torch's ``context_parallel`` is on, in which each rank holds a part of the sequence.

    It says so nowhere. It puts a function of its own in the place of SDPA, for all threads.
    """
    return str(getattr(functional.scaled_dot_product_attention, "__module__", None)).startswith(_EXPERIMENTAL)


def is_dtensor(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, which torch imports late."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def refuse_context_parallel() -> None:
    """Refuse a call inside ``context_parallel``, which only SDPA can answer.

    Raises:
        RuntimeError: The call is inside.
    """
    if in_context_parallel():
        raise RuntimeError(
            "s2o.attention cannot run inside torch's context_parallel, where it would attend each rank to its own "
            "tokens only; use SDPA there (attn_implementation='sdpa'), or leave the context"
        )


def refuse_dtensors(**tensors: torch.Tensor) -> None:
    """Refuse DTensors, for which the sparse operator has no sharding rule.

    Raises:
        TypeError: A tensor is a DTensor.
    """
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise TypeError(
                f"{name} must be a plain tensor, not a DTensor: where only the batch or heads are sharded, call "
                "s2o.attention on the parts that to_local() returns"
            )
