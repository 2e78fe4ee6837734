"""The one way in which kernels are launched: at once, into a plan that repeats them, or where a compiler sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch.library import wrap_triton

Grid = tuple[int, ...]
Launcher = Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], Any]

_FUSED = {"enable_fp_fusion": True}
"""Products and sums in one instruction, which Triton from 3.10 on does where it is asked to; 3.9 warns of that."""
_HIDDEN = {"maxnreg", *_FUSED}


def at_once(kernel: Any, grid: Grid, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """As Triton itself launches a kernel."""
    return kernel[grid](*arguments, **named)


def visibly(kernel: Any, grid: Grid, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """As an operation of the graph that a compiler traces. In eager mode that takes a millisecond.

    Such graphs have no place for some options, which change nothing but the time and the last digits.
    """
    return wrap_triton(kernel)[grid](*arguments, **{name: x for name, x in named.items() if name not in _HIDDEN})


_launcher: ContextVar[Launcher] = ContextVar("s2o_launcher", default=at_once)


@contextmanager
def launching(launcher: Launcher) -> Iterator[None]:
    """Let the kernels of this thread, or asynchronous task, be launched in some way."""
    token = _launcher.set(launcher)
    try:
        yield
    finally:
        _launcher.reset(token)


def is_launched_at_once() -> bool:
    """Whether nothing watches the launches, so that others may take their place."""
    return _launcher.get() is at_once


def launch(kernel: Any, grid: Grid, *arguments: Any, **named: Any) -> None:
    """Launch a kernel: `arguments` in the order of its parameters, the others and Triton's options by name."""
    _launcher.get()(kernel, grid, arguments, named | _FUSED)
