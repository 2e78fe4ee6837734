"""Time and memory of calls, on a CPU and on a GPU."""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")
Run = Callable[[], Any]

SETTLE = 0.3
"""Seconds for which a call to a GPU is repeated before it is timed."""
FLUSH_BYTES = 2**28
FLUSHES = 48
"""Writes of `FLUSH_BYTES` before a timed call: the cache is cold, and the host issues the call while they go on."""
BATCH = 10


def attempt(function: Callable[[], Result]) -> tuple[Result | None, str]:
    """What a function returns and ""; or None and why it failed, in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(), ""
    except Exception as error:  # backends raise all kinds of them for what they do not support
        return None, first_line(error)


def warm_up(run: Run) -> str:
    """Call something twice, so that it is compiled and warm; why it cannot be called, or "" where it can."""
    return attempt(run)[1] or attempt(run)[1]


def first_line(error: Exception) -> str:
    """Of its message, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def interleaved(runs: dict[str, Run], repetitions: int, clock: Callable[[Run], float]) -> dict[str, list[float]]:
    """The times of each call by a clock, the runs taking turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            times[name].append(clock(run))
    return times


def median_and_spread(times: list[float]) -> tuple[float, float]:
    """The median, and the whole range relative to it."""
    median = statistics.median(times)
    return median, (max(times) - min(times)) / median


def wall_seconds(run: Run) -> float:
    """Of one call that does not leave work to a GPU behind."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def settled(clock: Callable[[Run], float]) -> Callable[[Run], float]:
    """A clock for calls to a GPU that repeats each of them before: hot from another call, it runs slower for a while.

    Up to 1.4 times, on an H100 after dense attention of 131,072 positions.
    """

    def seconds(run: Run) -> float:
        start = time.perf_counter()
        while time.perf_counter() - start < SETTLE:
            run()
            torch.cuda.synchronize()
        return clock(run)

    return seconds


def gpu_seconds(run: Run) -> float:
    """Between two events around one call, by a GPU whose cache is cold and that does not wait for the host.

    Only a call that takes the host longer to issue than `FLUSHES` writes take (about 3 ms) has gaps in it.
    """
    flushed = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for _ in range(FLUSHES):
        flushed.zero_()
    return _between_events(run)


def idle_seconds(run: Run) -> float:
    """Between two events around one call to a GPU that has nothing else to do, and may wait for the host."""
    torch.cuda.synchronize()
    return _between_events(run)


def _between_events(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def issuing_seconds(run: Run) -> float:
    """What the host needs to issue a call to a GPU, the mean over a batch, without waiting for the GPU."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BATCH):
        run()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds / BATCH


def with_peak_memory(run: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """A call's result, and the bytes it allocated at its peak, its result included; None on a CPU."""
    if device.type == "cpu":
        return run(), None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    return result, torch.cuda.max_memory_allocated() - before


def kernel_seconds(run: Run) -> dict[str, float]:
    """Seconds of a GPU in one call, by kernel name, copies and fills included."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profiled.key_averages():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            seconds[event.key] += event.self_device_time_total / 1e6
    return seconds
