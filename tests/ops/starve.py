"""What becomes of calls under ever higher limits of memory; by itself, of one on a CPU, printed as JSON.

That takes a process of its own, as PyTorch keeps memory that it once had.
"""

from __future__ import annotations

import json
import logging
import resource
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from s2o_compile.ops import S2OConfig, memory


def outcomes(
    tensors: list[torch.Tensor], workspaces: tuple[int, ...], limit: Callable[[int | None], Any], rooms: Iterable[int]
) -> list[str]:
    """What becomes of a causal call that may allocate only so many bytes more.

    Args:
        tensors: Query, key and value.
        workspaces: Of the call, and those that are tried after it.
        limit: Sets how many bytes may be allocated from now on; None for as many as there are.
        rooms: The limits.

    Returns:
        For each the workspace that was enough, or "dense"; "wrong" where the bits are not those of a call with as much
        memory as there is, "error" for an error, "silent" or "loud" if the warning is missing, or should be.
    """

    def attend(config: S2OConfig, size: int) -> torch.Tensor:
        with memory.limited_workspace(size):
            return torch.ops.s2o.attention(*tensors, is_causal=True, **config.arguments())

    config = S2OConfig(min_length=0)
    # Not on the device, where they would keep segments of the allocator, in whose free parts a limited call finds room.
    wanted = {str(size): attend(config, size).cpu() for size in workspaces}
    wanted["dense"] = attend(config.without_ranking(), workspaces[0]).cpu()
    found = []
    for room in rooms:
        with attempts() as failed, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            limit(room)
            try:
                output = attend(config, workspaces[0])
            except (RuntimeError, MemoryError):
                found.append("error")
                continue
            finally:
                limit(None)
        name = [*wanted][len(failed)]
        is_told = any("runs dense" in str(warning.message) for warning in caught)
        if not torch.equal(output.cpu(), wanted[name]):
            name = "wrong"
        elif is_told != (name == "dense"):
            name = "loud" if is_told else "silent"
        found.append(name)
    return found


@contextmanager
def attempts() -> Iterator[list[logging.LogRecord]]:
    """What is logged of attempts that did not fit."""
    handler, failed = logging.Handler(), []
    handler.emit = failed.append  # type: ignore[method-assign]
    level = memory.log.level
    memory.log.setLevel(logging.INFO)
    memory.log.addHandler(handler)
    try:
        yield failed
    finally:
        memory.log.removeHandler(handler)
        memory.log.setLevel(level)


def limit_process(room: int | None) -> None:
    """Let this process map so many bytes more."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (-1 if room is None else mapped + room, -1))


if __name__ == "__main__":
    torch.manual_seed(0)
    inputs = [torch.randn(1, heads, 4096, 32) for heads in (2, 2, 2)]
    print(json.dumps(outcomes(inputs, (2**26, 2**23, 2**20), limit_process, range(0, 40 * 2**20, 2**20))))
