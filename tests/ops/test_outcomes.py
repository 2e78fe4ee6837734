"""Calls whose outcome is remembered: they come to what they came to at first, and what is refused is refused again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile.ops import dispatch, outcomes
from s2o_compile.ops.break_even import BreakEven
from s2o_compile.ops.operator import Call

FIELDS = ("visibility", "scale", "softcap", "site", "config")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    """No outcomes of other tests, nor any for others."""
    outcomes._found.clear()
    yield
    outcomes._found.clear()


def shapes(name: str) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes that mostly fit those of the others."""
    heads = st.sampled_from([4, 4, 4, 3, 0] if name == "query" else [2, 2, 2, 1, 0])
    four = st.tuples(
        st.sampled_from([1, 1, 1, 2]), heads, st.sampled_from([5, 5, 40, 0]), st.sampled_from([8, 8, 8, 0])
    )
    return st.one_of(four, four, four, st.just((4, 5, 8)), st.just((1, 2, 5, 300)))


def tensors(name: str) -> st.SearchStrategy[torch.Tensor]:
    def made(shape: tuple[int, ...], dtype: torch.dtype, device: str, kind: str) -> torch.Tensor:
        x = torch.zeros(shape, dtype=dtype, device=device)
        return torch.nn.Parameter(x, requires_grad=False) if kind == "parameter" else x.requires_grad_(kind == "grad")

    dtypes = st.sampled_from([torch.float32] * 6 + [torch.float16, torch.float64])
    devices = st.sampled_from(["cpu"] * 6 + ["meta"])
    return st.builds(made, shapes(name), dtypes, devices, st.sampled_from(["plain"] * 6 + ["parameter", "grad"]))


def sometimes(usual: Any, *others: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([usual] * (2 * len(others)) + list(others))


arguments = st.fixed_dictionaries(
    {name: tensors(name) for name in ("query", "key", "value")},
    optional={
        "is_causal": st.booleans(),
        "causal_offset": sometimes(0, 1, 40, -3),
        "scale": sometimes(None, 0.5, 0.0, -0.5, float("nan"), float("inf")),
        "window": sometimes(None, 3, 100, 0),
        "softcap": sometimes(0.0, 2.0, -1.0),
        "key_padding": sometimes(None, torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)),
        "sinks": sometimes(None, torch.zeros(4), torch.zeros(3)),
        "threshold": sometimes(0.01, 0.5, 2.0),
        "min_length": sometimes(None, 0, 10, -1),
        "settings": sometimes("", '{"pool": 4}', '{"pools": 4}', "["),
        "site": sometimes("", "a"),
    },
)


def outcome(call: dict[str, Any], grad: bool, autocast: bool) -> Any:
    """What a call comes to: fields and the choice, with tensors by what they hold, or the error."""
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            made = Call.of(**call)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        of_tensors = [(type(x), x.shape, x.dtype, x.device) for x in (made.query, made.key, made.value)]
        return of_tensors, [getattr(made, name) for name in FIELDS], made.sinks is None, made.chooses_sparse()


@given(st.lists(st.tuples(arguments, st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_remembered_calls_come_to_what_fresh_ones_do(calls: list[tuple[dict[str, Any], bool, bool]]) -> None:
    fresh = []
    for call in calls:
        outcomes._found.clear()
        fresh.append(outcome(*call))
    for _ in range(2):
        assert [outcome(*call) for call in calls] == fresh


def call(length: int = 40, **changes: Any) -> Call:
    query, key = torch.zeros(1, 4, length, 8), torch.zeros(1, 2, length, 8)
    return Call.of(**{"query": query, "key": key, "value": key, "is_causal": True} | changes)


def test_a_second_call_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    first = call()
    monkeypatch.delattr("s2o_compile.ops.operator.validate")
    monkeypatch.delattr("s2o_compile.ops.operator.choose_sparse")
    second = call(site="another")
    assert second.chooses_sparse() is first.chooses_sparse() is False
    assert second.site == "another"


def test_other_limits_choose_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not call().chooses_sparse()
    monkeypatch.setattr(dispatch, "break_even", lambda *_: BreakEven(0.0, 1.0, "a test"))
    assert call().chooses_sparse()
    monkeypatch.undo()
    assert not call().chooses_sparse()


def test_not_all_outcomes_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outcomes, "_MOST", 3)
    for length in range(40, 50):
        assert call(length).query.shape[2] == length
        assert len(outcomes._found) <= 3


def test_symbolic_sizes_are_not_remembered() -> None:
    def model(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.s2o.attention(x, x, x, is_causal=True)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (40, 50):
        x = torch.randn(1, 2, length, 8)
        torch.testing.assert_close(compiled(x), model(x))
    sizes = {size for key in outcomes._found if isinstance(key, tuple) for shape in key[:3] for size in shape}
    assert {type(size) for size in sizes} == {int}


def test_calls_under_vmap() -> None:
    """Tensors look plain there, by the shapes that a call has there."""
    x = torch.randn(3, 1, 2, 40, 8)
    got = torch.func.vmap(lambda x: torch.ops.s2o.attention(x, x, x, is_causal=True))(x)
    want = torch.stack([torch.ops.s2o.attention(x, x, x, is_causal=True) for x in x])
    torch.testing.assert_close(got, want)
