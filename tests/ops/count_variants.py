"""Print the kernels that calls of other lengths would have compiled again for an H100, were there one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.kernels import attend, decode, dense, pipeline, quantise
from s2o_compile.ops.kernels.plan import Launch, layout_of, plan_of
from s2o_compile.ops.part import Part
from s2o_compile.ops.places import Places
from s2o_compile.ops.requests import Request
from s2o_compile.ops.visibility import Visibility

LENGTHS = 16384, 16000, 8193, 32767, 65536
"""Multiples of 16 and others; the first is what kernels are compiled for, where the next lengths rank any keys."""
MERGED = Ranking(merge_length=0)
HALF: dict[str, Any] = {"dtype": torch.bfloat16, "device": "meta"}
CALLS: dict[str, Callable[[int], tuple[Visibility, Ranking]]] = {
    "causal": lambda length: (Visibility(True), MERGED),
    "both directions": lambda length: (Visibility(), MERGED),
    "every query": lambda length: (Visibility(True), Ranking(radius=0.0)),
    "window": lambda length: (Visibility(True, window=length // 2 + 1), Ranking()),
    "offset": lambda length: (Visibility(True, length // 3), MERGED),
    "no tail": lambda length: (Visibility(True), Ranking(merge_length=0, rule="dropped")),
}


def look_up(compute: Any, tensors: Any, device: torch.device, *constants: Any, late: Any = None) -> None:
    """Have Triton look for the kernels of a call, of tensors whose addresses are multiples of 16."""
    made = plan_of(compute, tuple(None if x is None else layout_of(x) for x in tensors), device, constants)
    assert made is not None
    for step in made.steps:
        if isinstance(step, Launch):
            arguments = step.arguments.copy()
            for place, operand in step.operands:
                arguments[place] = torch.empty(1, dtype=operand.dtype)
            step.kernel.run(*arguments, grid=step.grid, warmup=True, **step.options)


def decode_some(length: int) -> None:
    """Have requests of about a length decode, of pages in a table that is as wide as they need, beside a prompt."""
    some = [Request(number, slice(number, number + 1), slice(0, length - number)) for number in range(1 + length % 7)]
    query, pages = torch.empty(length, 12, 128, **HALF), torch.empty(length // 16 + 9, 16, 2, 128, **HALF)
    table = torch.empty(len(some), length // 16 + 1, dtype=torch.int32, device="meta")
    decode.decode(query, query, pages, pages, table, some, (-1, 0), 0.1, 0.0, None)


def main() -> None:
    """All calls, of all lengths."""
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
        )
    )
    pipeline.planned = dense.planned = decode.planned = look_up
    attend.shared_memory = dense.shared_memory = decode.shared_memory = lambda device: 227 * 1024
    decode.multiprocessors = lambda device: 132
    quantise.ranks_in_float8 = lambda guides, softcap, device: True
    quantise.adds_in_half = lambda device: True
    found: set[str] = set()
    new: list[str] = []

    def look(*, key: str, fn: Any, **_: Any) -> bool:
        if key not in found:
            new.append(fn.name)
        found.add(key)
        return True

    knobs.runtime.jit_cache_hook = look
    for name, call in CALLS.items():
        for length in LENGTHS:
            query, key = (torch.empty(1, heads, length, 128, **HALF) for heads in (12, 2))
            visibility, ranking = call(length)
            pipeline.sparse_attention(query, key, key, visibility, 0.1, 0.0, S2OConfig(ranking=ranking))
            if ranking == MERGED:
                part = Part(places=Places(query.new_empty(length, dtype=torch.int32), length))
                pipeline.sparse_attention(query, key, key, visibility, 0.1, 0.0, S2OConfig(ranking=ranking), part)
                dense.attend_densely(query, key, key, visibility, 0.1, 0.0)
            decode_some(length)
            if length != LENGTHS[0]:
                print(*(f"{name}, {length}: {kernel}" for kernel in new), sep="\n", end="\n" if new else "")
            new.clear()
    print(len(found))


if __name__ == "__main__":
    main()
