"""Processes that wait for functions to call, each one rank of a process group."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

SECONDS = 30
"""How long a rank waits for the others."""


class Ranks:
    """So many processes on this machine, which talk over gloo, or each with a GPU over NCCL.

    Functions and their arguments must pickle; results are numbers, text and numpy arrays, which do not share memory.
    """

    def __init__(self, count: int, store: Path, backend: str = "gloo") -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(count)]
        self.connections = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, count, store, backend, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let each rank call a function."""
        for connection in self.connections:
            connection.send((function, arguments))

    def answers(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function returns on each rank, a RuntimeError with what it raises; EOFError of one that ended."""
        self.start(function, *arguments)
        return [_received(connection) for connection in self.connections]

    def call(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function returns on each rank; an error has the tracebacks of all ranks that failed."""
        answers = self.answers(function, *arguments)
        failed = [str(answer) or "a rank ended" for answer in answers if isinstance(answer, BaseException)]
        assert not failed, "\n".join(failed)
        return answers

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def device() -> str:
    """The device of this rank."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def _received(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError as ended:
        return ended


def _serve(rank: int, count: int, store: Path, backend: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    timeout = datetime.timedelta(seconds=SECONDS)
    distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count, timeout=timeout)
    while True:
        function, arguments = connection.recv()
        try:
            answer = function(*arguments)
        except BaseException as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        connection.send(answer)
