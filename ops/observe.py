"""Lets recorders watch sparse calls as they run, and names the calls in the traces of ``torch.profiler``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import record_function

from .config import S2OConfig
from .part import Part
from .result import AttentionResult
from .visibility import Visibility


class SparseInputs(NamedTuple):
    """The inputs of a sparse call, and the `site` that it belongs to; '' if that is not known.

    `part` says of what sequence the queries are a part; None where they are all of it.
    """

    site: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    visibility: Visibility
    scale: float
    softcap: float
    config: S2OConfig
    part: Part | None = None

    @property
    def name(self) -> str:
        """The site, or the shapes of the call."""
        return self.site or f"query {list(self.query.shape)}, key {list(self.key.shape)}"

    @property
    def has_places(self) -> bool:
        """Whether keys and values are where the part of the sequence says, not one after another."""
        return self.part is not None and self.part.places is not None

    @property
    def in_order(self) -> SparseInputs:
        """The same, with keys and values that follow one another."""
        if self.part is None or self.part.places is None:
            return self
        key, value = (self.part.places.ordered(x) for x in (self.key, self.value))
        return self._replace(key=key, value=value, part=self.part._replace(places=None))


class Recorder(Protocol):
    """An observer of sparse calls."""

    def record(self, call: SparseInputs, result: AttentionResult, seconds: Callable[[], float]) -> None:
        """Take note of a call, whose keys may be `in_order` or not.

        `seconds` says how long it took, for which it waits until a GPU is done.
        """


_recorders: ContextVar[tuple[Recorder, ...]] = ContextVar("s2o_recorders", default=())
_of_all: list[Recorder] = []
"""The recorders of all threads."""
_works_for_all: ContextVar[bool] = ContextVar("s2o_works_for_all", default=False)


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Let a recorder watch the calls of this thread, or asynchronous task, beside those that already do."""
    token = _recorders.set((*_recorders.get(), recorder))
    _of_all.append(recorder)
    try:
        yield
    finally:
        _of_all.remove(recorder)
        _recorders.reset(token)


@contextmanager
def working_for_all() -> Iterator[None]:
    """Let the recorders of all threads watch the calls of this one, as it is an engine that works for all."""
    token = _works_for_all.set(True)
    try:
        yield
    finally:
        _works_for_all.reset(token)


def recorded(call: SparseInputs, compute: Callable[[], AttentionResult]) -> AttentionResult:
    """The result of a call, shown to all recorders, unless a CUDA graph is being captured."""
    with _traced(call):
        recorders = tuple(_of_all) if _works_for_all.get() else _recorders.get()
        if not recorders or (call.query.is_cuda and torch.cuda.is_current_stream_capturing()):
            return compute()
        result, seconds = _timed(compute, call.query.device)
    for recorder in recorders:
        recorder.record(call, result, seconds)
    return result


def _traced(call: SparseInputs) -> AbstractContextManager[Any]:
    """A range in the trace of a profiler, if one runs: making it takes longer than asking."""
    if torch.autograd._profiler_enabled():
        return record_function(f"s2o {call.name}")
    return nullcontext()


def _timed(compute: Callable[[], AttentionResult], device: torch.device) -> tuple[AttentionResult, Callable[[], float]]:
    if device.type == "cpu":
        begin = time.perf_counter()
        result = compute()
        elapsed = time.perf_counter() - begin
        return result, lambda: elapsed
    stream = torch.cuda.current_stream(device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    result = compute()
    end.record(stream)

    def seconds() -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000

    return result, seconds
