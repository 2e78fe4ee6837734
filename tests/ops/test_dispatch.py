"""Sparse or dense: the work of calls against pairs that are counted one by one, and what follows from it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from s2o_compile.ops import S2OConfig, break_even, devices, dispatch, tuned, work
from s2o_compile.ops.break_even import SHIPPED, BreakEven
from s2o_compile.ops.visibility import Visibility
from s2o_compile.ops.work import Work, work_of

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CAUSAL = Visibility(True)

terms = st.tuples(st.booleans(), st.integers(-60, 60), st.none() | st.integers(1, 80)).map(
    lambda drawn: Visibility(drawn[0], drawn[1], window=drawn[2])
)
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def shapes(queries: int, keys: int, batch: int = 1, heads: int = 9, width: int = 64, value_width: int = 64) -> Shapes:
    kv_heads = math.gcd(heads, 3)
    return (batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_width)


def counted(given_shapes: Shapes, visibility: Visibility) -> Work:
    """The work of a call whose visible pairs are counted."""
    (batch, heads, queries, width), (_, _, keys, _), (*_, value_width) = given_shapes
    row, column = torch.arange(queries)[:, None], torch.arange(keys)
    pairs = int(visibility.seen(0, 0, row, column).expand(queries, keys).sum())
    return Work(batch * heads * pairs * (width + value_width), pairs / max(1, queries))


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 4), st.integers(1, 9), terms)
def test_work_is_that_of_counted_pairs(queries: int, keys: int, batch: int, heads: int, mask: Visibility) -> None:
    call = shapes(queries, keys, batch, heads, 24, 40)
    least, most = work_of(*call, mask)
    assert least == most == counted(call, mask)


@dataclass(frozen=True)
class Between:
    """Stands for a symbolic size between two numbers: torch's own take a tenth of a second each."""

    low: int
    high: int

    def __add__(self, other: Any) -> Between:
        return Between(self.low + ends(other)[0], self.high + ends(other)[1])

    __radd__ = __add__

    def __sub__(self, other: Any) -> Between:
        return Between(self.low - ends(other)[1], self.high - ends(other)[0])

    def __rsub__(self, other: int) -> Between:
        return Between(other - self.high, other - self.low)


def ends(size: Any) -> tuple[int, int]:
    return (size.low, size.high) if isinstance(size, Between) else (size, size)


def drawn(first: int, last: int) -> st.SearchStrategy[Between]:
    two = st.tuples(*[st.integers(first, last)] * 2)
    return two.map(lambda pair: Between(min(pair), max(pair)))


@given(st.tuples(*[drawn(0, 60)] * 4), drawn(-40, 40), st.none() | drawn(1, 80), st.booleans(), st.data())
def test_symbolic_work_is_a_range(
    sizes: tuple[Between, ...], offset: Between, window: Between | None, is_causal: bool, data: st.DataObject
) -> None:
    """No call of sizes between some numbers does less than the least or more than the most."""

    def call(size: Callable[[Between], Any]) -> tuple[Work, Work]:
        batch, queries, keys, width = map(size, sizes)
        mask = Visibility(is_causal, size(offset), window=None if window is None else size(window))
        return work_of((batch, 4, queries, width), (batch, 2, keys, width), (batch, 2, keys, 8), mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "bounds", ends)
        least, most = call(lambda size: size)
    one, _ = call(lambda size: data.draw(st.integers(size.low, size.high)))
    assert least.multiply_adds <= one.multiply_adds <= most.multiply_adds
    assert least.keys <= one.keys <= most.keys


def symbol(low: int, high: int | None = None) -> torch.SymInt:
    """A symbolic size between two numbers."""
    size = ShapeEnv().create_unbacked_symint()
    torch._check(size >= low)
    if high is not None:
        torch._check(size <= high)
    return size


def choose(call: Shapes, mask: Visibility = CAUSAL, device: torch.device = CPU, **fields: Any) -> bool | None:
    return dispatch.choose_sparse(*call, mask, device, torch.float32, S2OConfig(**fields))


def why(call: Shapes, mask: Visibility = CAUSAL, device: torch.device = CPU, **fields: Any) -> str:
    assert choose(call, mask, device, **fields) is False
    sentence = dispatch.why_dense(*call, mask, device, torch.float32, S2OConfig(**fields))
    assert "\n" not in sentence and not sentence.endswith(".")
    return sentence


@given(st.integers(33, 300), st.integers(1, 300), st.integers(1, 4), terms, st.floats(0, 1e7), st.floats(0, 200))
def test_by_default_work_and_keys_decide(
    queries: int, keys: int, batch: int, mask: Visibility, least: float, seen: float
) -> None:
    call = shapes(queries, keys, batch)
    done = counted(call, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "break_even", lambda *_: BreakEven(least, seen, "a test"))
        assert choose(call, mask) is (done.multiply_adds >= least and done.keys >= seen)


def test_min_length() -> None:
    fields = {"min_length": 1000, "last_queries": 100}
    assert choose(shapes(1000, 1000), **fields)
    assert choose(shapes(999, 999), **fields) is False
    assert choose(shapes(1000, 1000), Visibility(True, window=8), **fields), "a number of keys is all that decides"
    assert choose(shapes(100, 5000), **fields) is False
    assert choose(shapes(101, 5000), **fields)
    assert choose(shapes(1, 1), min_length=0)
    assert choose(shapes(10**6, 10**6), min_length=dispatch.DENSE_AT_ANY_LENGTH) is False


@pytest.mark.parametrize(
    ("device", "heads", "width", "length", "gains"),
    [
        (CUDA, (32, 8), 128, 8192, False),
        (CUDA, (32, 8), 128, 12_288, True),
        (CUDA, (28, 4), 128, 12_288, True),
        (CUDA, (12, 2), 128, 10_752, False),
        (CUDA, (12, 2), 128, 12_288, True),
        (CUDA, (16, 8), 256, 32_768, False),
        (CUDA, (9, 3), 64, 16_384, False),
        (CUDA, (9, 3), 64, 32_768, True),
        (CPU, (9, 3), 64, 4096, False),
        (CPU, (9, 3), 64, 8192, True),
        (CPU, (4, 1), 128, 8192, True),
    ],
)
def test_as_shipped_calls_gain_where_they_were_measured_to(
    device: torch.device, heads: tuple[int, int], width: int, length: int, gains: bool
) -> None:
    call = tuple((1, number, length, width) for number in (heads[0], heads[1], heads[1]))
    assert choose(call, device=device) is gains  # type: ignore[arg-type]
    assert choose(call, Visibility(True, window=512), device) is False, "few keys at any length"


def test_chunks_of_a_long_prompt_are_sparse() -> None:
    """A chunk sees many keys a query, in little work."""
    assert choose(shapes(512, 32_768), Visibility(True, 32_768 - 512))
    assert choose(shapes(512, 32_768), Visibility(True, 0)) is False, "without an offset they see 512 at most"


def test_batches_add_up() -> None:
    one, four = (((batch, 12, 10_752, 128), (batch, 2, 10_752, 128), (batch, 2, 10_752, 128)) for batch in (1, 4))
    assert choose(one, device=CUDA) is False and choose(four, device=CUDA)


def test_symbolic_sizes() -> None:
    def of(length: Any, batch: Any = 1) -> Shapes:
        return (batch, 12, length, 128), (batch, 2, length, 128), (batch, 2, length, 128)

    assert choose(of(symbol(32_768)), device=CUDA) is True
    assert choose(of(symbol(2, 4096), symbol(1)), device=CUDA) is False
    assert choose(of(symbol(2)), device=CUDA) is None
    assert choose(of(10_752, symbol(1)), device=CUDA) is None
    assert choose(of(10_752, symbol(2)), device=CUDA) is True
    assert choose(of(symbol(2)), Visibility(True, window=512), CUDA) is False
    assert choose(of(symbol(2)), Visibility(True, window=8192), CUDA) is None
    assert choose(of(symbol(2)), min_length=1000) is None
    assert choose(of(symbol(2, 999)), min_length=1000) is False
    assert choose(of(symbol(1000)), min_length=1000) is True
    assert choose(of(symbol(2, 32))) is False
    assert choose(of(symbol(2)), min_length=dispatch.DENSE_AT_ANY_LENGTH) is False
    assert why(of(symbol(2, 4096))).startswith("a query sees too few keys to gain, 2,048 on average")


def test_reasons() -> None:
    assert why(shapes(10, 10_000)).startswith("10 queries over 10000 keys are too few to gain; min_length=0 asks")
    assert why(shapes(99, 99), min_length=100).startswith("99 keys are fewer than min_length=100;")
    assert why(shapes(1000, 1000)).startswith(
        "a query sees too few keys to gain, 500 on average, and sparse attention pays from 3,072 on"
    )
    window = why(shapes(10**5, 10**5), Visibility(True, window=512), CUDA)
    assert window.startswith(
        "a query sees too few keys to gain, 511 on average, and sparse attention pays from 5,120 on (shipped for sm_90"
    )
    small = why(shapes(16_384, 16_384), device=CUDA)
    assert small.startswith(
        "the call is too little work to gain, 1.5e+11 multiply-adds, and sparse attention pays from 2.3e+11 on"
    )


def test_a_device_that_was_never_faster_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "break_even", lambda *_: BreakEven(math.inf, math.inf, "a test"))
    long = shapes(10**6, 10**6)
    assert why(long).startswith("sparse attention was slower at any length (a test); min_length=0 asks")
    assert choose(long, min_length=1000)


def test_a_cpu_without_bfloat16_gains_where_queries_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "kind_of", lambda device: devices.OTHER_CPU)
    monkeypatch.setattr(dispatch, "break_even", break_even.break_even.__wrapped__)
    assert SHIPPED[devices.OTHER_CPU][1] >= S2OConfig().ranking.merge_length
    for length in (32_766, 32_768):
        assert choose(shapes(length, length)) is (length == 32_768)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("amx_bf16", devices.AMX),
        ("avx512_bf16", devices.AVX512),
        ("bf16", devices.AVX512),
        ("avx2", devices.OTHER_CPU),
    ],
)
def test_kinds_of_cpu(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {name: True, "amx_tile": True})
    monkeypatch.setattr(devices, "has_fast_bfloat16", devices.has_fast_bfloat16.__wrapped__)
    assert devices.has_fast_bfloat16() is (kind != devices.OTHER_CPU)
    assert devices.kind_of.__wrapped__(CPU) == kind


@pytest.mark.parametrize(
    ("kind", "like"), [("sm_75", "sm_80"), ("sm_86", "sm_80"), ("sm_89", "sm_89"), ("sm_100", "sm_90")]
)
def test_gpus_that_are_not_listed(kind: str, like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "kind_of", lambda device: kind)
    assert break_even.shipped(CUDA, torch.float32)[:2] == SHIPPED[like]


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 12_288), (torch.bfloat16, 40_960), (torch.float16, 40_960)]
)
def test_amx_multiplies_half_precision_alone(dtype: torch.dtype, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "kind_of", lambda device: devices.AMX)
    monkeypatch.setattr(dispatch, "break_even", break_even.break_even.__wrapped__)
    for length in (least - 2, least):
        found = dispatch.choose_sparse(*shapes(length, length), CAUSAL, CPU, dtype, S2OConfig())
        assert found is (length == least)


@pytest.fixture
def tuned_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this CPU's file would be."""
    monkeypatch.setenv("S2O_TUNED", str(tmp_path))
    path = tuned.path_of(devices.name_of(CPU), torch.float32)
    assert path is not None
    return path


def measured() -> BreakEven:
    return break_even.break_even.__wrapped__(CPU, torch.float32)


def test_a_tuned_file_decides(tuned_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = measured()
    assert shipped[:2] == SHIPPED[devices.AVX512] and shipped.source.startswith("shipped for")
    tuned_file.write_text(tuned.as_text(devices.name_of(CPU), 1e3, 50.0, rows=[]))
    assert measured() == (1e3, 50.0, str(tuned_file))
    tuned_file.write_text(tuned.as_text(devices.name_of(CPU), math.inf, 50.0))
    assert measured().is_never
    assert break_even.break_even.__wrapped__(CPU, torch.bfloat16) == shipped, "measured in float32"
    monkeypatch.setenv("S2O_TUNED", "0")
    assert measured() == shipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is no file of 's2o tune, version 1'"),
        ("[]", "it is no file of"),
        ("[" * 10**5, "it is no file of"),
        (json.dumps({"format": tuned.FORMAT, "device": "x", "least_work": 1}), "it is no file of"),
        (json.dumps({"format": "other", "device": "x", "least_work": 1, "least_keys": 1}), "it is no file of"),
        (tuned.as_text("x", -1.0, 1.0), "it is no file of"),
        (tuned.as_text("x", math.nan, 1.0), "it is no file of"),
        (tuned.as_text("x", 1.0, True), "it is no file of"),
        (tuned.as_text("NVIDIA H200", 1.0, 1.0), "it is of another device, 'NVIDIA H200'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_warning(text: str, message: str, tuned_file: Path) -> None:
    tuned_file.write_text(text)
    break_even.break_even.cache_clear()
    try:
        with pytest.warns(UserWarning, match="tuned-.* is ignored: ") as caught:
            assert break_even.break_even(CPU, torch.float32)[:2] == SHIPPED[devices.AVX512]
            assert break_even.break_even(CPU, torch.float32).source.startswith("shipped for")
    finally:
        break_even.break_even.cache_clear()
    assert len(caught) == 1 and message in str(caught[0].message)


def test_a_file_that_cannot_be_read_is_a_warning(tuned_file: Path) -> None:
    tuned_file.mkdir()
    with pytest.warns(UserWarning, match="is ignored: Is a directory"):
        measured()


def test_no_folder_is_no_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "missing", tmp_path / "file"):
        monkeypatch.setenv("S2O_TUNED", str(place))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert measured().source.startswith("shipped for")


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("S2O_TUNED")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    for dtype in (torch.bfloat16, torch.float16):
        assert tuned.path_of("NVIDIA H200", dtype) == Path("/somewhere/s2o-compile/tuned-nvidia-h200-half.json")
    assert tuned.path_of("NVIDIA H200", torch.float32) == Path("/somewhere/s2o-compile/tuned-nvidia-h200-float32.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.folder() == Path.home() / ".cache/s2o-compile"
