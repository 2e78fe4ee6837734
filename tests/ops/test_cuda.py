"""The operator on a GPU: queued without waiting, captured in CUDA graphs, the same bits again, beyond 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from s2o_compile.ops.config import S2OConfig
from s2o_compile.ops.kernels.pipeline import sparse_attention, sparse_triton
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility

from .comparison import dense, largest_difference, seen
from .settings import config_of

pytestmark = pytest.mark.gpu

LENGTH, HEADS, GROUPS, CHANNELS = 2100, 4, 2, 64
SETTINGS = {
    "defaults": S2OConfig(min_length=0),
    "no tail": config_of(min_length=0, rule="dropped"),
    "lists per head": config_of(min_length=0, lists="head"),
    "pools of 4": config_of(min_length=0, pool=4),
    "guides per KV head": config_of(min_length=0, guides="kv_head", pool=8, combine="mean"),
    "16 channels": config_of(min_length=0, channels=16),
    "output": config_of(min_length=0, measure="output"),
    "exact": S2OConfig(min_length=0, threshold=0.0),
}
BY_TORCH = {
    "block means": config_of(min_length=0, rule="means"),
    "the paper's": S2OConfig.paper(min_length=0),
}
"""What has no kernels, and waits for the GPU."""
TERMS = ["nothing", "padding", "window", "documents", "mask", "soft cap", "sinks"]


def tensors(seed: int = 0, dtype: torch.dtype = torch.bfloat16, channels: int = CHANNELS) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(2, heads, LENGTH, channels, generator=generator, device="cuda", dtype=dtype) * scale
        for heads, scale in ((HEADS, 2), (GROUPS, 1), (GROUPS, 1))
    ]


def terms(name: str) -> dict[str, Any]:
    """The arguments of a call, beside the causal mask."""
    place = torch.arange(LENGTH, device="cuda")
    documents = (place // 700).expand(2, -1)
    arguments: dict[str, dict[str, Any]] = {
        "nothing": {},
        "padding": {"key_padding": place >= torch.tensor([[300], [0]], device="cuda")},
        "window": {"window": 500},
        "documents": {"query_documents": documents, "key_documents": documents},
        "mask": {"mask": (place + place[:, None]) % 3 > 0},
        "soft cap": {"softcap": 5.0},
        "sinks": {"sinks": torch.linspace(-1, 1, HEADS, device="cuda")},
    }
    return arguments[name]


def attend(inputs: list[torch.Tensor], **arguments: Any) -> torch.Tensor:
    return torch.ops.s2o.attention(*inputs, is_causal=True, **{"min_length": 0, **arguments})


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Fail where the host waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SETTINGS)
def test_calls_do_not_wait(name: str, dtype: torch.dtype) -> None:
    inputs = tensors(dtype=dtype)
    attend(inputs, **SETTINGS[name].arguments())
    with no_synchronisation():
        attend(inputs, **SETTINGS[name].arguments())


@pytest.mark.parametrize("name", TERMS)
def test_calls_with_terms_do_not_wait(name: str) -> None:
    inputs, arguments = tensors(), terms(name)
    attend(inputs, **arguments)
    with no_synchronisation():
        attend(inputs, **arguments)


@pytest.mark.parametrize("name", TERMS)
def test_calls_that_run_dense_do_not_wait(name: str) -> None:
    inputs, arguments = tensors(), terms(name)
    inputs[0] = inputs[0][:, :, -1:]
    if "query_documents" in arguments:
        arguments["query_documents"] = arguments["query_documents"][:, -1:]
    if "mask" in arguments:
        arguments["mask"] = arguments["mask"][-1:]
    torch.ops.s2o.attention(*inputs, is_causal=True, causal_offset=LENGTH - 1, **arguments)
    with no_synchronisation():
        torch.ops.s2o.attention(*inputs, is_causal=True, causal_offset=LENGTH - 1, **arguments)


@pytest.mark.parametrize("name", [*SETTINGS, *BY_TORCH])
def test_the_same_input_gives_the_same_bits(name: str) -> None:
    inputs, settings = tensors(), (SETTINGS | BY_TORCH)[name].arguments()
    first = attend(inputs, **settings)
    assert torch.equal(attend([x.clone() for x in inputs], **settings), first)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", BY_TORCH)
def test_rules_without_kernels_are_those_of_a_cpu(name: str, is_causal: bool) -> None:
    inputs = tensors(dtype=torch.float32)
    got = torch.ops.s2o.attention_stats(*inputs, is_causal, **BY_TORCH[name].arguments())
    on_cpu = (x.cpu().double() for x in inputs)
    want = reference_attention(*on_cpu, Visibility(is_causal), config=BY_TORCH[name])
    assert largest_difference(got[0].cpu(), want.output) <= 1e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 1), (12, 2), (7, 1), (28, 4), (8, 8)])
def test_a_mask_that_hides_nothing_changes_nothing(heads: int, kv_heads: int) -> None:
    generator = torch.Generator("cuda").manual_seed(heads)
    query, key, value = (
        torch.randn(1, n, 1030, 128, generator=generator, device="cuda", dtype=torch.bfloat16) * scale
        for n, scale in ((heads, 2), (kv_heads, 1), (kv_heads, 1))
    )
    mask = torch.ones(1, heads, 1030, 1030, dtype=torch.bool, device="cuda")
    plain, masked = (
        sparse_attention(query, key, value, Visibility(True, mask=given), 128**-0.5, 0.0, S2OConfig())
        for given in (None, mask)
    )
    assert torch.equal(plain.visited, masked.visited)
    assert largest_difference(plain.output, masked.output) < 0.02


@pytest.mark.parametrize("name", SETTINGS)
def test_cuda_graphs(name: str) -> None:
    """A captured call computes, for other inputs, what the call itself does."""
    places, side = tensors(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        attend(places, **SETTINGS[name].arguments())
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend(places, **SETTINGS[name].arguments())
    for seed in range(1, 4):
        inputs = tensors(seed)
        for place, x in zip(places, inputs, strict=True):
            place.copy_(x)
        graph.replay()
        assert torch.equal(output, attend(inputs, **SETTINGS[name].arguments()))


@pytest.mark.parametrize("name", SETTINGS)
def test_inductor(name: str) -> None:
    """In Inductor's kernels, as in packages, a call errs no more than by itself, also where channels are left out."""
    torch.compiler.reset()
    query, key, value = tensors(channels=128)
    query *= 0.75  # Half the channels would neglect too much of the variance of larger logits.
    want = dense(query, key, value, seen(query, key, Visibility(True)))
    itself = (attend([query, key, value], **SETTINGS[name].arguments()) - want).norm()
    settings = SETTINGS[name].as_json

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        return sparse_triton(*tensors, True, 0, None, None, None, None, None, 128**-0.5, 0.0, settings)[0]

    got = torch.compile(call, fullgraph=True)(query, key, value)
    assert (got - want).norm() <= 1.1 * itself


def test_a_padded_batch() -> None:
    inputs, padding = tensors(dtype=torch.float32), terms("padding")["key_padding"]
    got = attend(inputs, threshold=0.0, key_padding=padding)
    want = dense(*inputs, seen(*inputs[:2], Visibility(True, key_padding=padding)))
    assert largest_difference(got, want) <= 1e-5
    assert not got[0, :, :300].any()


@pytest.fixture
def memory() -> Iterator[None]:
    """Room for a handful of tensors of 2^31 elements in half precision."""
    if torch.cuda.mem_get_info()[0] < 40e9:
        pytest.skip("needs 40 GB of free GPU memory")
    yield
    torch.cuda.empty_cache()


LONG, MANY_HEADS, WIDTH = 2**18 + 1000, 64, 128
assert LONG * MANY_HEADS * WIDTH > 2**31


def assert_rows_equal_dense(
    output: torch.Tensor, inputs: list[torch.Tensor], rows: list[int], offset: int, window: int = LONG
) -> None:
    """Compare rows of the first, a middle and the last head with dense attention in float32."""
    query, key, value = inputs
    for head in (0, query.shape[1] // 2 + 1, query.shape[1] - 1):
        group = head * key.shape[1] // query.shape[1]
        for row in rows:
            visible = slice(max(0, row + offset - window + 1), row + offset + 1)
            logits = key[0, group, visible].float() @ query[0, head, row].float() * WIDTH**-0.5
            want = logits.softmax(0) @ value[0, group, visible].float()
            torch.testing.assert_close(output[0, head, row].float(), want, rtol=0, atol=0.02 * float(want.abs().max()))


@pytest.mark.usefixtures("memory")
def test_keys_beyond_32_bits() -> None:
    """256K keys of 64 heads, seen by the last queries."""
    torch.manual_seed(1)
    query = torch.randn(1, MANY_HEADS, 100, WIDTH, device="cuda", dtype=torch.bfloat16) * 2
    key, value = (torch.randn(1, MANY_HEADS, LONG, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    offset = LONG - 100
    output = attend([query, key, value], causal_offset=offset, threshold=0.0)
    assert_rows_equal_dense(output, [query, key, value], [0, 57, 99], offset)


@pytest.mark.usefixtures("memory")
def test_queries_beyond_32_bits() -> None:
    """256K queries of 64 heads, of which each sees a window."""
    torch.manual_seed(2)
    query = torch.randn(1, MANY_HEADS, LONG, WIDTH, device="cuda", dtype=torch.bfloat16) * 2
    key, value = (torch.randn(1, 1, LONG, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    output = attend([query, key, value], window=500, threshold=0.0)
    assert_rows_equal_dense(output, [query, key, value], [0, 1234, 2**17 + 3, LONG - 1], 0, window=500)
