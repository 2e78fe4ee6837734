"""What surrounds a call: whether it is traced for a package, inside a transform of torch.func, or watched at all."""

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


def _keys(*names: str) -> int:
    """A set of dispatch keys as bits."""
    keys = 0
    for name in names:
        keys |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return keys


_OF_ALL = ("BackendSelect", "ADInplaceOrView")
_UNWATCHED = {
    "cpu": _keys("CPU", "AutogradCPU", "AutocastCPU", *_OF_ALL),
    "cuda": _keys("CUDA", "AutogradCUDA", "AutocastCUDA", *_OF_ALL),
}
"""The dispatch keys of plain tensors and threads. None but the first of a device does anything for an operator that is
implemented for that device alone, where no input asks for a gradient."""


def is_watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether anything sees, or takes the place of, an operator on tensors of a device that it is implemented for.

    Modes, transforms, tracers, subclasses and views that are still to be negated all show in dispatch keys. To ask
    takes the host 2 microseconds, to call an operator 10 more than its implementation.
    """
    unwatched = _UNWATCHED.get(query.device.type)
    if unwatched is None or not type(query) is type(key) is type(value) is torch.Tensor:
        return True
    if torch.autograd._profiler_enabled():
        return True
    keys_of = torch._C._dispatch_keys
    of_tensors = keys_of(query).raw_repr() | keys_of(key).raw_repr() | keys_of(value).raw_repr()
    return bool((of_tensors | torch._C._dispatch_tls_local_include_set().raw_repr()) & ~unwatched)
