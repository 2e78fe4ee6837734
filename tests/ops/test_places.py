"""Keys and values that the kernels read where they are, in pages: the bits of those that follow one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile import Ranking, S2OConfig, attention_varlen
from s2o_compile.ops import AttentionResult, observe, operator
from s2o_compile.ops.kernels import pipeline, quantise
from s2o_compile.ops.paged import gathered, placed
from s2o_compile.ops.part import Part
from s2o_compile.ops.places import Places
from s2o_compile.ops.requests import Request
from s2o_compile.ops.sampled_error import sampled_error
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from .comparison import assert_same
from .settings import config_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
LAYOUTS = {"NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "heads first": (2, 0, 1, 3), "channels apart": (0, 1, 3, 2)}
RANKINGS: dict[str, dict[str, Any]] = {
    "merged": {"merge_length": 0, "radius": 4.0, "channels": None},
    "every query": {"radius": 0.0, "channels": 40},
    "pooled": {"radius": 0.0, "pool": 4, "channels": 32},
    "dropped": {"merge_length": 0, "rule": "dropped", "channels": 40},
}


@pytest.fixture(autouse=True)
def ranks_in_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there is no GPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(quantise, "ranks_in_float8", lambda guides, softcap, device: not softcap)
        monkeypatch.setattr(quantise, "adds_in_half", lambda device: False)


def pool(layout: str, blocks: int, size: int, heads: int, channels: int) -> torch.Tensor:
    """Pages [blocks, size, heads, channels] of NaN, with something beside each row."""
    sizes, order = (blocks, size, heads, channels + 3), LAYOUTS[layout]
    memory = torch.full([sizes[n] for n in order], torch.nan, dtype=DTYPE, device=DEVICE)
    return memory.permute([order.index(n) for n in range(4)])[..., 1:-2]


def draw_pools(
    layout: str, size: int, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [Lk, H, D] in pages, as the second of three requests, and the table."""
    count = -(-len(key) // size)
    order = torch.randperm(count + 3, device=DEVICE)[:count]
    table = torch.full((3, count + 1), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    table[1, :count] = order
    slots = torch.arange(len(key), device=DEVICE)
    pools = []
    for x in (key, value):
        pages = pool(layout, count + 3, size, *x.shape[1:])
        pages[order[slots // size], slots % size] = x
        pools.append(pages)
    return pools[0], pools[1], table


@pytest.mark.hypothesis
@settings(max_examples=examples(8), deadline=None)
@given(
    st.tuples(st.integers(40, 130), st.integers(0, 150), st.integers(1, 2), st.integers(1, 3)),
    st.sampled_from([1, 7, 16, 64, 256]),
    st.sampled_from(["NHD", "HND", "heads first"]),
    st.sampled_from(list(RANKINGS)),
    st.sampled_from([0.0, 0.05, 0.3]),
    st.booleans(),
    st.integers(0, 2**16),
)
def test_places_give_the_bits_of_keys_in_order(
    sizes: tuple[int, int, int, int],
    page: int,
    layout: str,
    ranking: str,
    threshold: float,
    is_causal: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    queries, past, kv_heads, group = sizes
    query = torch.randn(1, kv_heads * group, queries, 64, device=DEVICE).to(DTYPE) * 2
    key, value = (torch.randn(queries + past, kv_heads, n, device=DEVICE).to(DTYPE) for n in (64, 40))
    config = config_of(threshold=threshold, near_keys=16, **RANKINGS[ranking])
    terms = Visibility(is_causal, past)

    def attend(key: torch.Tensor, value: torch.Tensor, part: Part | None) -> AttentionResult:
        key, value = (x.transpose(0, 1)[None] for x in (key, value))
        return pipeline.sparse_attention(query, key, value, terms, 0.125, 0.0, config, part)

    found = placed(*draw_pools(layout, page, key, value), Request(1, slice(0, queries), slice(0, len(key))))
    assert found is not None and pipeline.reads_places(query, terms, 0.0, config)
    of_key, of_value, places = found
    assert_same(attend(of_key, of_value, Part(places=places)), attend(key, value, None), 0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1, 5])
def test_places_of_any_layout_are_those_of_its_pages(layout: str, size: int) -> None:
    key, value = (torch.randn(13, 2, n, device=DEVICE).to(DTYPE) for n in (8, 16))
    *pools, table = draw_pools(layout, size, key, value)
    request = Request(1, slice(0, 13), slice(0, 13))
    found = placed(pools[0], pools[1], table, request)
    if layout == "channels apart":
        assert found is None
        return
    assert found is not None
    for row, x, pages in zip(found[:2], (key, value), pools, strict=True):
        assert row.shape == x.shape and row.data_ptr() == pages.data_ptr()
        ordered = found[2].ordered(row.transpose(0, 1)[None])[0].transpose(0, 1)
        assert torch.equal(ordered, x) and torch.equal(ordered, gathered(pages, table, [request]))


def test_pools_that_differ_have_no_places() -> None:
    """In how many rows a page takes; and pages that are read twice, so that there are more keys than rows."""
    key, value = pool("NHD", 4, 5, 2, 16), pool("HND", 4, 5, 2, 16)
    table = torch.zeros(1, 9, dtype=torch.int32, device=DEVICE)
    assert placed(key, value, table, Request(0, slice(0, 1), slice(0, 5))) is None
    assert placed(key, key, table, Request(0, slice(0, 1), slice(0, 21))) is None
    assert placed(key, key, table, Request(0, slice(0, 1), slice(0, 20))) is not None
    assert placed(key, key[..., :0], table, Request(0, slice(0, 1), slice(0, 5))) is None


@pytest.mark.parametrize(
    ("terms", "softcap", "settings"),
    [
        (Visibility(True, 3, window=9), 0.0, {}),
        (Visibility(True, 3), 5.0, {}),
        (Visibility(True, 3), 0.0, {"measure": "output"}),
        (Visibility(True, 3), 0.0, {"channels": 16}),
        (Visibility(True, 3, key_padding=torch.ones(1, 9) > 0), 0.0, {}),
    ],
)
def test_what_asks_for_keys_themselves_gets_them_in_order(
    terms: Visibility, softcap: float, settings: dict[str, Any]
) -> None:
    query = torch.zeros(1, 1, 6, 64, dtype=DTYPE, device=DEVICE)
    assert not pipeline.reads_places(query, terms, softcap, config_of(**settings))


class Calls:
    """A recorder that keeps what it is shown."""

    def __init__(self) -> None:
        self.calls: list[observe.SparseInputs] = []

    def record(self, call: observe.SparseInputs, result: AttentionResult, seconds: Any) -> None:
        """Keep a call."""
        self.calls.append(call)


@pytest.mark.parametrize(
    ("settings", "looks_up"),
    [({}, True), ({"rule": "gain", "channels": None, "lists": "head"}, False), ({"channels": 20}, False)],
)
@pytest.mark.parametrize("is_watched", [False, True])
def test_calls_see_keys_in_order_and_are_shown_as_they_are(
    settings: dict[str, Any], looks_up: bool, is_watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no kernels for places gets copies, and so does who measures the error; others none."""
    key, value = (torch.randn(90, 2, 64, device=DEVICE).to(DTYPE) for _ in "kv")
    found = placed(*draw_pools("HND", 16, key, value), Request(1, slice(0, 40), slice(0, 90)))
    assert found is not None
    query = torch.randn(1, 2, 40, 64, device=DEVICE).to(DTYPE)
    copied, ordered = [], Places.ordered
    monkeypatch.setattr(Places, "ordered", lambda places, x: copied.append(x) or ordered(places, x))
    monkeypatch.setattr(operator, "_sparse_cpu", operator._sparse_cuda)
    arguments = {"is_causal": True, "causal_offset": 50, **config_of(radius=0.0, **settings).arguments()}

    def attend(key: torch.Tensor, value: torch.Tensor, part: Part) -> torch.Tensor:
        operands = (x.transpose(0, 1)[None] for x in (key, value))
        return operator.Call.of(query, *operands, **arguments).sparse(part).output

    watching = Calls()
    if is_watched:
        with observe.recording(watching):
            got = attend(*found[:2], Part(places=found[2]))
    else:
        got = attend(*found[:2], Part(places=found[2]))
    assert len(copied) == (0 if looks_up else 2)
    assert len(watching.calls) == is_watched
    for call in watching.calls:
        ordered_call = call.in_order
        assert torch.equal(ordered_call.key[0].transpose(0, 1), key)
        assert torch.equal(ordered_call.value[0].transpose(0, 1), value)
        of_places, of_copies = (sampled_error(shown, got, 7, 0) for shown in (call, ordered_call))
        assert torch.equal(of_places, of_copies) and of_places[0] < 0.1 * of_places[1]
    assert torch.equal(got, attend(key, value, Part()))


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize(
    ("settings", "terms", "looks_up"),
    [
        ({}, {}, True),
        ({"rule": "dropped"}, {"sinks": torch.linspace(-1, 2, 4)}, True),
        ({"measure": "output"}, {}, False),
        ({"rule": "gain", "channels": None, "lists": "head"}, {}, False),
        ({}, {"softcap": 5.0}, False),
        ({}, {"window_size": (300, 0)}, False),
    ],
)
def test_packed_requests_in_pages_are_those_packed(
    settings: dict[str, Any], terms: dict[str, Any], looks_up: bool, page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if looks_up:
        monkeypatch.setattr(Places, "ordered", None)
    query = torch.randn(300, 4, 64, device=DEVICE).to(DTYPE)
    key, value = (torch.randn(800, 2, 64, device=DEVICE).to(DTYPE) for _ in "kv")
    pools = draw_pools("NHD", page, key, value)
    named = {"window_size": (-1, 0), "config": S2OConfig(min_length=0, ranking=Ranking(**settings)), **terms}
    if "sinks" in named:
        named["sinks"] = named["sinks"].to(DEVICE)
    got = attention_varlen(
        query, *pools[:2], [0, 0, 300, 300], None, 300, 800, seqused_k=[0, 800, 0], block_table=pools[2], **named
    )
    assert torch.equal(got, attention_varlen(query, key, value, [0, 300], [0, 800], 300, 800, **named))
