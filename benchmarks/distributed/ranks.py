"""Processes, one a rank, and times and numbers of all of them."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import distributed

from s2o_compile.timing import Run, median_and_spread, wall_seconds, with_peak_memory


def on_ranks(count: int, device: str, work: Callable[..., Any], *arguments: Any) -> Any:
    """What the first of so many new processes returns, which all do the same work; over NCCL on GPUs, gloo on a CPU.

    Raises:
        RuntimeError: One of them failed; the message is the last line of what it says.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(_work, (count, device, Path(folder), work, arguments), nprocs=count)
        except torch.multiprocessing.ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
        return torch.load(Path(folder) / "result", weights_only=False)


def _work(
    rank: int, count: int, device: str, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    options: dict[str, Any] = {"init_method": f"file://{folder}/store", "rank": rank, "world_size": count}
    if device == "cuda":
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", **options)
    try:
        with torch.no_grad():
            result = work(*arguments)
        if rank == 0:
            torch.save(result, folder / "result")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()
    # What libraries clear on the way out, such as semaphores, is cleared. After that, Python has been seen to abort a
    # process (SIGABRT) over a thread of PyTorch's that still ran.
    atexit._run_exitfuncs()
    os._exit(0)


def device_of_rank(kind: str) -> torch.device:
    """The device of this process, a CPU or its own GPU."""
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")


def of_all(number: float | None) -> list[Any]:
    """A number of each rank."""
    numbers: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(numbers, number)
    return numbers


def seconds_of_ranks(run: Run, device: torch.device, repetitions: int) -> list[list[float]]:
    """The seconds of each rank in each repetition [repetitions, ranks]; the ranks start together."""
    clock = wall_seconds if device.type == "cpu" else _gpu_seconds
    run()
    times = []
    for _ in range(repetitions):
        distributed.barrier()
        times.append(of_all(clock(run)))
    return times


def of_slowest(times: list[list[float]]) -> tuple[float, float]:
    """The seconds of the slowest rank, of [repetitions, ranks]: their median, and their range over it."""
    return median_and_spread([max(of_ranks) for of_ranks in times])


def medians(times: list[list[float]]) -> list[float]:
    """The median of each rank's seconds, of [repetitions, ranks]."""
    return [median_and_spread(list(of_rank))[0] for of_rank in zip(*times, strict=True)]


def balance(numbers: Sequence[float]) -> float:
    """The largest number of a rank over the mean of all."""
    return max(numbers) / mean(numbers)


def peak_mebibytes(run: Run, device: torch.device) -> float | None:
    """Of the rank with the most; None on a CPU."""
    _, size = with_peak_memory(run, device)
    sizes = of_all(size)
    return None if size is None else max(sizes) / 2**20


def _gpu_seconds(run: Run) -> float:
    """Between two events around a call, the first of which all ranks reach together."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    together = torch.zeros(1, device="cuda")
    run()  # The clocks of a GPU that waited are low.
    distributed.all_reduce(together)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3
