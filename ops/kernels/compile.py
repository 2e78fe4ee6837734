"""Compilation of several kernels at once, before any of them is launched."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from typing import Any

from triton import AsyncCompileMode
from triton.runtime import driver

_THREADS = 16
"""Kernels at once, at most; a plan has about ten."""
_one_at_a_time = threading.Lock()


def compile_ahead(compilations: Sequence[Callable[[], None]]) -> None:
    """Do what has Triton compile kernels, in threads: most of it is outside Python, or leaves other threads its lock.

    Kernels that were compiled before are found again. What fails here is left to the launch of the kernel, which says
    why.
    """
    with _one_at_a_time, suppress(Exception):
        # In a context of its own, what Triton keeps in it while it compiles in threads is gone whatever happens.
        Context().run(_compile, compilations)


def _compile(compilations: Sequence[Callable[[], None]]) -> None:
    threads = min(_THREADS, os.cpu_count() or 1)
    with _Compilers(threads, "s2o-compile") as compilers, AsyncCompileMode(compilers, ignore_errors=True):
        for compilation in compilations:
            compilation()


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels, each with what launches it: some releases of Triton compile that from C."""

    def submit(self, compilation: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        return super().submit(_with_launcher, compilation, *arguments, **named)


def _with_launcher(compilation: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    compiled = compilation(*arguments, **named)
    # Triton makes another when it loads the binary, and finds this one on disk. To load needs the device.
    driver.active.launcher_cls(compiled.src, compiled.metadata)
    return compiled
