"""The workspace of calls; calls that do not fit into memory are retried with less, and finally run dense."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch

from .config import S2OConfig
from .result import AttentionResult

VARIABLE = "S2O_WORKSPACE"
DEFAULT_WORKSPACE = 2**30
LEAST_WORKSPACE = 2**20
"""Bytes below which no workspace is tried: where that does not fit, it is not the workspace that does not."""

_MESSAGES = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive")
"""Messages of errors without a type of their own: CUDA's and Triton's, PyTorch's on a CPU, C++'s, and oneDNN's."""

log = logging.getLogger(__name__)

_limit: ContextVar[int | None] = ContextVar("s2o_workspace", default=None)


def workspace() -> int:
    """Bytes that lists of keys, and the importances they are made from, may take together in a call.

    On a CPU it counts the scores of keys, of which no more are held at once than fit its caches. A call that needs more
    works through its segments in runs, at least one segment each. At 131,072 positions of 32 heads over 8, 2**33 is up
    to 5% faster than the default on a GPU. The environment variable S2O_WORKSPACE sets it for the process.

    Raises:
        ValueError: The variable is no whole number above 0.
    """
    limit = _limit.get()
    return _read(os.environ.get(VARIABLE)) if limit is None else limit


@contextmanager
def limited_workspace(size: int) -> Iterator[None]:
    """Let calls of this thread, or asynchronous task, have a workspace of so many bytes."""
    token = _limit.set(size)
    try:
        yield
    finally:
        _limit.reset(token)


@functools.cache
def _read(text: str | None) -> int:
    if text is None:
        return DEFAULT_WORKSPACE
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise ValueError(f"the environment variable {VARIABLE} must be a whole number of bytes above 0, not {text!r}")
    return int(text)


def fit_into_memory(attend: Callable[[S2OConfig], AttentionResult], config: S2OConfig) -> AttentionResult:
    """The result of a call, in an eighth of the workspace as often as memory does not suffice, or else without ranking.

    Raises:
        RuntimeError: Not even that fits, in the words of PyTorch; or it is not known, as a CUDA graph is captured.
    """
    size = None
    while size is None or size >= LEAST_WORKSPACE:
        try:
            with nullcontext() if size is None else limited_workspace(size):
                return attend(config)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or _is_capturing():
                raise
        # Here, without the error, all that the attempt held is free again.
        size = size or workspace()
        log.info("memory does not suffice for a call with a workspace of %d bytes", size)
        size //= 8
    warnings.warn("s2o: a call of attention runs dense, as memory does not suffice to rank its keys", stacklevel=2)
    return attend(config.without_ranking())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, does not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
