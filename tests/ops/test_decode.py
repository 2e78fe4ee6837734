"""The kernel for requests of few queries, which reads their keys where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile import S2OConfig, attention_varlen
from s2o_compile.ops import packed
from s2o_compile.ops.kernels import decode as kernel
from s2o_compile.ops.kernels import plan, tiling
from s2o_compile.ops.kernels.tiling import DECODED_BLOCKS, PROGRAMS, SHORTEST_SPLIT, decode_tiling, keys_per_split
from s2o_compile.ops.requests import read_requests

from ..examples import examples
from . import packing
from .comparison import dense, largest_difference
from .packing import LAYOUTS, Packing, assert_rows, dense_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DENSE = S2OConfig(min_length=10**6)
# Triton's interpreter multiplies the bits of bfloat16.
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, **({torch.bfloat16: 0.03} if DEVICE == "cuda" else {})}

BATCH = dataclasses.replace(
    packing.BATCH,
    lengths=((1, 90), (8, 200), (0, 40), (1, 1), (3, 0), (5, 2), (2, 61), (0, 0), (1, 17)),
    per_kv_head=3,
)
"""Of 0 to 8 queries; some have no keys, or fewer keys than queries."""


@st.composite
def decoding(draw: st.DrawFn) -> Packing:
    """Calls of requests that the kernel takes."""
    size = st.tuples(st.integers(0, 8), st.sampled_from([0, 1, 3, 15, 16, 17, 64, 65, 130]))
    channels, value_channels = draw(st.sampled_from([(16, 16), (40, 40), (64, 64), (24, 40), (64, 16)]))
    return Packing(
        lengths=tuple(draw(st.lists(size, min_size=1, max_size=4))),
        kv_heads=draw(st.integers(1, 2)),
        per_kv_head=draw(st.sampled_from([1, 3, 6, 20])),
        channels=channels,
        value_channels=value_channels,
        block_size=draw(st.sampled_from([None, 1, 4, 5, 16])),
        layout=draw(st.sampled_from(LAYOUTS)),
        slack=draw(st.sampled_from([0, 9])),
        shared=draw(st.booleans()),
        window_size=draw(st.sampled_from([(-1, 0), (-1, -1), (0, 0), (20, 0), (70, -1), (5, 9), (2**40, 2**40)])),
        softcap=draw(st.sampled_from([0.0, 4.0, 1e30])),
        sunk=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3, -0.2, 0.0])),
        padding=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**16)),
    )  # fmt: skip


@pytest.fixture
def _by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed.Packed, "decodes", True)


@pytest.fixture
def _in_splits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Requests are split as on a GPU, of 16 keys."""
    plan.plan_of.cache_clear()
    monkeypatch.setattr(tiling, "SHORTEST_SPLIT", 16)
    monkeypatch.setattr(tiling, "PROGRAMS", 10**6)
    yield
    plan.plan_of.cache_clear()


def attend(call: Packing, dtype: torch.dtype) -> torch.Tensor:
    return attention_varlen(**call.arguments(DEVICE, dtype), config=DENSE)


def check(call: Packing, dtype: torch.dtype) -> None:
    assert_rows(call, attend(call, dtype), dense_of(call, DEVICE, dtype), TOLERANCES[dtype])


@pytest.mark.usefixtures("_by_the_kernel")
@settings(max_examples=examples(40))
@given(decoding(), st.sampled_from(sorted(TOLERANCES, key=str)))
def test_the_kernel_is_dense_attention_of_each_request(call: Packing, dtype: torch.dtype) -> None:
    check(call, dtype)


@pytest.mark.usefixtures("_by_the_kernel", "_in_splits")
@settings(max_examples=examples(16))
@given(decoding(), st.sampled_from(sorted(TOLERANCES, key=str)))
def test_splits_are_added_up(call: Packing, dtype: torch.dtype) -> None:
    check(call, dtype)


@pytest.mark.usefixtures("_by_the_kernel", "_in_splits")
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("window_size", [(-1, 0), (300, 2)])
def test_more_splits_than_are_added_up_at_once(window_size: tuple[int, int], sunk: bool) -> None:
    call = dataclasses.replace(BATCH, lengths=((1, 700), (3, 40), (2, 257)), window_size=window_size, sunk=sunk)
    check(call, torch.float32)


@pytest.mark.usefixtures("_by_the_kernel")
@pytest.mark.parametrize("block_size", [None, 5, 16])
def test_requests_of_few_queries_go_to_the_kernel_with_their_like(
    block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = []

    def decode(out: Any, query: Any, key: Any, value: Any, table: Any, requests: Any, *rest: Any) -> None:
        numbers.append([request.number for request in requests])
        kernel_decode(out, query, key, value, table, requests, *rest)

    kernel_decode = kernel.decode
    monkeypatch.setattr(kernel, "decode", decode)
    lengths = ((1, 40), (9, 30), (8, 20), (20, 20), (2, 0), (1, 33), (5, 16))
    check(dataclasses.replace(BATCH, lengths=lengths, block_size=block_size, slack=3), torch.float32)
    assert numbers == [[0, 5], [2, 6]]


@pytest.mark.usefixtures("_by_the_kernel")
@pytest.mark.parametrize("is_split", [False, True])
def test_the_output_is_written_to_its_rows_alone(is_split: bool, request: pytest.FixtureRequest) -> None:
    if is_split:
        request.getfixturevalue("_in_splits")
    arguments = BATCH.arguments(DEVICE)
    want = attention_varlen(**arguments, config=DENSE)
    end = BATCH.rows[-1].stop
    apart = torch.full((BATCH.value_channels, len(want), 2 * BATCH.heads), 7.0, device=DEVICE)
    for buffer in (apart.permute(1, 2, 0), torch.full((len(want), 2 * BATCH.heads, 30), 7.0, device=DEVICE)[..., 1:25]):
        out = buffer[:, ::2]
        attention_varlen(**arguments, out=out, config=DENSE)
        assert torch.equal(out[:end], want[:end])
        out[:end] = 7
        assert (buffer == 7).all()


@pytest.mark.usefixtures("_by_the_kernel", "_in_splits")
def test_many_requests_of_different_lengths() -> None:
    """More than are looked through at once, of no keys and of many splits."""
    lengths = tuple((1 + place % 2, place * 37 % 50 if place % 3 else 0) for place in range(300))
    check(dataclasses.replace(BATCH, lengths=(*lengths, (2, 170)), kv_heads=1, per_kv_head=1), torch.float32)


@pytest.mark.usefixtures("_in_splits")
@pytest.mark.parametrize("block_size", [None, 5])
def test_requests_without_keys(block_size: int | None) -> None:
    """Beside others, and alone; with sinks too they give zeros."""
    for lengths in (((2, 0), (1, 40)), ((2, 0), (1, 0))):
        call = dataclasses.replace(BATCH, lengths=lengths, block_size=block_size, sunk=True)
        x = call.arguments(DEVICE)
        table = x.get("block_table")
        requests = read_requests(x["cu_seq_q"], x["cu_seq_k"], x["seqused_k"], table is not None)
        out = torch.full((*x["query"].shape[:2], call.value_channels), torch.nan, device=DEVICE)
        terms = (call.window_size, call.channels**-0.5, 0.0, call.sinks(DEVICE))
        kernel.decode(out, x["query"], x["key"], x["value"], table, requests, *terms)
        out[3:] = 0
        assert_rows(call, out, dense_of(call, DEVICE), 2e-5)


@pytest.mark.usefixtures("_by_the_kernel")
def test_steps_of_a_server_share_a_plan() -> None:
    """While requests get more keys, and prompts of other lengths lie beside them."""
    plan.plan_of.cache_clear()
    for step in range(3):
        lengths = ((1, 70 + step), (20 + step, 20 + step), (1, 100 + step))
        check(dataclasses.replace(BATCH, lengths=lengths), torch.float32)
    assert plan.plan_of.cache_info().misses == 1


@pytest.mark.parametrize("lists", [1, 8, 96])
@pytest.mark.parametrize("keys", [1, 255, 256, 257, 16 * 4096, 16 * 32768, 131072 + 63 * 1024])
def test_splits_fill_a_gpu(keys: int, lists: int) -> None:
    size = keys_per_split(keys, lists, 132)
    assert size >= SHORTEST_SPLIT and size & (size - 1) == 0
    assert size == SHORTEST_SPLIT or keys // size * lists >= PROGRAMS * 132


def test_splits_stay_while_requests_grow() -> None:
    assert len({keys_per_split(16 * keys, 8, 132) for keys in range(4096, 8192, 16)}) <= 2


@pytest.mark.parametrize("shared", [99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("channels", [64, 96, 128, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_fit_into_shared_memory(itemsize: int, channels: int, shared: int) -> None:
    blocks = decode_tiling(channels, itemsize, 1, shared)
    assert blocks.rows == 16 and blocks.num_stages == 1 + DECODED_BLOCKS
    assert DECODED_BLOCKS * 2 * blocks.keys * channels * itemsize <= shared


GPU_CALLS: list[dict[str, Any]] = [
    {"channels": 64, "value_channels": 64, "block_size": 16},
    {"channels": 96, "value_channels": 96, "block_size": 48, "window_size": (1000, 0), "sunk": True},
    {"channels": 128, "value_channels": 128, "block_size": None},
    {"channels": 128, "value_channels": 128, "block_size": 1, "window_size": (700, 3), "softcap": 20.0},
    {"channels": 128, "value_channels": 64, "block_size": 256, "window_size": (-1, -1), "sunk": True},
    {"channels": 256, "value_channels": 256, "block_size": 16, "softcap": 20.0},
    {"channels": 256, "value_channels": 256, "block_size": None, "per_kv_head": 2},
    {"channels": 40, "value_channels": 72, "block_size": 5, "softcap": 20.0, "sunk": True},
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("changes", GPU_CALLS)
def test_on_a_gpu(changes: dict[str, Any], dtype: torch.dtype) -> None:
    """Many splits, without waiting for the GPU."""
    lengths = ((1, 4096), (1, 4097), (8, 1500), (3, 1), (1, 9001), (4, 300))
    call = dataclasses.replace(BATCH, lengths=lengths, kv_heads=4, per_kv_head=7, layout="side by side")
    call = dataclasses.replace(call, **changes)
    arguments = call.arguments("cuda", dtype)
    attention_varlen(**arguments, config=DENSE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attention_varlen(**arguments, config=DENSE)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_rows(call, got, dense_of(call, "cuda", dtype), TOLERANCES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", [None, 16])
def test_captured_calls_keep_their_lengths(block_size: int | None) -> None:
    """A CUDA graph reads them again from the host in each replay, whatever has been pinned there since."""
    call = dataclasses.replace(BATCH, lengths=((1, 4096), (1, 900), (8, 1500)), block_size=block_size)
    arguments = call.arguments("cuda", torch.bfloat16)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attention_varlen(**arguments, config=DENSE)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attention_varlen(**arguments, config=DENSE)
    pinned = [torch.zeros(size, dtype=torch.int32).pin_memory() for size in range(1, 200)]
    for _ in range(2):
        arguments["query"].normal_()
        graph.replay()
        assert torch.equal(got, attention_varlen(**arguments, config=DENSE))
    assert not any(x.any() for x in pinned)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads, per_kv_head", [(1, 1), (8, 4), (2, 6), (1, 71)])
@pytest.mark.parametrize("queries, layout", list(zip([1, 2, 5, 8, 1], LAYOUTS, strict=True)))
def test_heads_and_layouts_on_a_gpu(queries: int, layout: str, kv_heads: int, per_kv_head: int) -> None:
    call = dataclasses.replace(
        BATCH, lengths=((queries, 5000), (1, 777), (queries, 2048)), kv_heads=kv_heads, per_kv_head=per_kv_head,
        channels=128, value_channels=128, layout=layout,
    )  # fmt: skip
    check(call, torch.bfloat16)


@pytest.mark.gpu
def test_pages_beyond_4_gib_on_a_gpu() -> None:
    """Addresses of 64 bits."""
    pool = torch.full((2**20 + 8, 16, 1, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
    pages = torch.tensor([[2**20 + 3, 5, 2**20 + 7]], device="cuda")
    pool[pages[0]] = torch.randn(3, 16, 1, 128, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(1, 4, 128, device="cuda", dtype=torch.bfloat16)
    got = attention_varlen(query, pool, pool, [0, 1], None, 1, 41, seqused_k=[41], block_table=pages, config=DENSE)
    keys = pool[pages[0]].flatten(0, 1)[:41].transpose(0, 1)[None]
    want = dense(query.transpose(0, 1)[None], keys, keys, torch.ones(1, 41, dtype=torch.bool, device="cuda"))
    assert largest_difference(got.transpose(0, 1)[None], want) < 0.03
