"""Calls that do not fit into memory: made again in less workspace, and at last without ranking."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator

import torch

from .config import S2OConfig
from .result import AttentionResult

LEAST_WORKSPACE = 2**20
"""Bytes below which no workspace is tried: where that does not fit, it is not the workspace that does not."""

_MESSAGES = ("out of memory", "can't allocate memory", "bad_alloc", "could not create a primitive")
"""Messages of errors without a type of their own: CUDA's and Triton's, PyTorch's on a CPU, C++'s, and oneDNN's."""

log = logging.getLogger(__name__)


def fit_into_memory(attend: Callable[[S2OConfig], AttentionResult], config: S2OConfig) -> AttentionResult:
    """The result of a call, in an eighth of the workspace as often as memory does not suffice, or else without ranking.

    Raises:
        RuntimeError: Not even that fits, in the words of PyTorch; or it is not known, as a CUDA graph is captured.
    """
    for settings in _workspaces(config):
        try:
            return attend(settings)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or _is_capturing():
                raise
        # Here, without the error, all that the attempt held is free again.
        log.info("memory does not suffice for a call with a workspace of %d bytes", settings.workspace)
    warnings.warn("s2o: a call of attention runs dense, as memory does not suffice to rank its keys", stacklevel=2)
    return attend(config.without_ranking())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a device or of the host, does not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def _workspaces(config: S2OConfig) -> Iterator[S2OConfig]:
    yield config
    while config.workspace // 8 >= LEAST_WORKSPACE:
        config = dataclasses.replace(config, workspace=config.workspace // 8)
        yield config


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
