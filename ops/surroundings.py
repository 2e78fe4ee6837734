"""What surrounds a call: whether it is traced for a package, or inside a transform of torch.func."""

from __future__ import annotations

import sys

import torch


def is_packaging() -> bool:
    """Whether Inductor compiles for a process without Python."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    return virtualized is not None and virtualized.V.aot_compilation


def is_transformed() -> bool:
    """Whether a transform of torch.func runs, such as vmap: operators that are opaque to it have no rule for it."""
    return torch._C._are_functorch_transforms_active()
