"""Calls that reach every kernel, to be run under compute-sanitizer on a GPU.

python -m tests.ops.sanitize
compute-sanitizer --tool memcheck python -m tests.ops.sanitize
compute-sanitizer --tool racecheck python -m tests.ops.sanitize

The first run compiles the kernels, for many minutes; the others then take seconds. Several processes compile sooner,
each of them a part of the calls, here the first of twelve parts: `python -m tests.ops.sanitize 0 12`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from s2o_compile import Ranking, S2OConfig, attention, attention_varlen
from s2o_compile.ops.kernels.dense import attend_densely
from s2o_compile.ops.visibility import Visibility

POSITIONS = 397
"""No multiple of anything."""
SETTINGS = {
    "default": S2OConfig(min_length=0, ranking=Ranking(merge_length=0)),
    "every query": S2OConfig(min_length=0),
    "dense": S2OConfig(min_length=0, threshold=0),
    "packed": S2OConfig(
        min_length=0,
        ranking=Ranking(pool=8, guides="kv_head", channels=None, combine="mean", rule="dropped"),
    ),
    "no tail": S2OConfig(min_length=0, ranking=Ranking(merge_length=0, rule="dropped")),
    "pool 4": S2OConfig(min_length=0, threshold=1e-3, ranking=Ranking(pool=4)),
    "lists per head": S2OConfig(min_length=0, ranking=Ranking(merge_length=0, lists="head")),
    "few channels": S2OConfig(min_length=0, ranking=Ranking(merge_length=0, channels=16)),
    "all channels": S2OConfig(min_length=0, ranking=Ranking(merge_length=0, channels=None)),
    "output": S2OConfig(min_length=0, ranking=Ranking(merge_length=0, measure="output")),
    "last queries": S2OConfig(min_length=0, last_queries=40),
}


def terms(heads: int) -> dict[str, dict[str, Any]]:
    """One call for each term of a mask, and one without any."""
    position = torch.arange(POSITIONS, device="cuda")
    documents = (position // 150)[None]
    return {
        "causal": {},
        "padding": {"key_padding": (position > 20)[None]},
        "window": {"window": 100},
        "documents": {"query_documents": documents, "key_documents": documents},
        "mask": {"mask": torch.rand(1, heads, POSITIONS, POSITIONS, device="cuda") < 0.8},
        "soft cap": {"softcap": 30.0},
        "both directions": {"is_causal": False},
    }


def call(config: S2OConfig, heads: int, kv_heads: int, dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    """Make one call, and check that it gives numbers."""
    query = torch.randn(1, heads, POSITIONS, 128, device="cuda", dtype=dtype)
    key, value = (torch.randn(1, kv_heads, POSITIONS, 128, device="cuda", dtype=dtype) for _ in "kv")
    output = attention(query, key, value, **{"is_causal": True, **arguments}, config=config)
    assert not output.isnan().any()


def call_dense(dtype: torch.dtype, arguments: dict[str, Any]) -> None:
    """Make one call of dense attention without a mask, and check that it gives numbers."""
    query, key, value = (torch.randn(1, heads, POSITIONS, 128, device="cuda", dtype=dtype) for heads in (4, 2, 2))
    named = {"is_causal": True, **arguments}
    softcap = named.pop("softcap", 0.0)
    output, _ = attend_densely(query, key, value, Visibility(**named), 0.1, softcap)
    assert not output.isnan().any()


def call_packed(dtype: torch.dtype, queries: int, pages: int, arguments: dict[str, Any]) -> None:
    """Make one call of requests of as many queries, in pages of 7 keys in no order, and check that it gives numbers."""
    keys = [POSITIONS, 3, pages * 7, 500]
    query = torch.randn(queries * len(keys), 6, 128, device="cuda", dtype=dtype)
    key, value = (torch.randn(len(keys) * pages, 7, 2, 128, device="cuda", dtype=dtype) for _ in "kv")
    table = torch.randperm(len(key), device="cuda").view(len(keys), pages).int()
    starts = [queries * number for number in range(len(keys) + 1)]
    named = {"window_size": (-1, 0), **arguments}
    output = attention_varlen(
        query, key, value, starts, None, queries, max(keys), seqused_k=keys, block_table=table, **named
    )
    assert not output.isnan().any()


def calls() -> Iterator[Callable[[], None]]:
    """All settings; all terms, also of other numbers of heads; other precisions; dense attention, also of pages."""
    default = SETTINGS["default"]
    for config in SETTINGS.values():
        yield partial(call, config, 4, 1, torch.bfloat16, {})
    for heads, kv_heads in ((4, 1), (12, 2), (7, 1)):
        for term in terms(heads).values():
            yield partial(call, default, heads, kv_heads, torch.bfloat16, term)
    for dtype in (torch.float16, torch.float32):
        for name in ("default", "dense", "packed"):
            yield partial(call, SETTINGS[name], 4, 1, dtype, {})
    for dtype in (torch.bfloat16, torch.float16):
        for name, term in terms(4).items():
            if name != "mask":
                yield partial(call_dense, dtype, term)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        sinks = torch.randn(6, device="cuda")
        for named in ({}, {"window_size": (100, 2), "softcap": 30.0, "sinks": sinks}):
            for queries in (1, 5):
                yield partial(call_packed, dtype, queries, 200, named)
        yield partial(call_packed, dtype, 150, 200, {"config": default})


def main(part: int = 0, parts: int = 1) -> None:
    """Make one of `parts` of the calls."""
    torch.manual_seed(0)
    made = list(calls())[part::parts]
    for make in made:
        make()
    torch.cuda.synchronize()
    print(f"{len(made)} calls")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
