"""What surrounds a call: whether it is traced for a package, transformed by torch.func, or watched by a user."""

from __future__ import annotations

import sys

import torch
from torch.overrides import has_torch_function


def is_packaging() -> bool:
    """Whether Inductor compiles for a process without Python."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation


def is_transformed() -> bool:
    """Whether a transform of torch.func runs, such as vmap: operators that are opaque to it have no rule for it."""
    return torch._C._are_functorch_transforms_active()


def is_watched(*tensors: torch.Tensor) -> bool:
    """Whether something looks at the operators that are called on tensors, or casts what they are given.

    That is a graph, a mode, a subclass, a profiler, or autocast.
    """
    if torch.compiler.is_compiling() or has_torch_function(tensors) or torch._C._is_any_autocast_enabled():
        return True
    return torch.autograd._profiler_enabled() or torch._C._len_torch_dispatch_stack() > 0
