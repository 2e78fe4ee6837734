"""Calls whose outcome is remembered: they come to what they came to at first, and what is refused is refused again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from s2o_compile import S2OConfig, attention
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


def result(attend: Callable[..., torch.Tensor], call: dict[str, Any], grad: bool, autocast: bool) -> Any:
    """What a function returns for a call, or raises."""
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        try:
            output = attend(**call)
        except (TypeError, ValueError) as error:
            return type(error), str(error)
        return output.shape, output.stride(), output.dtype, output.device


def by_operator(config: S2OConfig | None = None, **call: Any) -> torch.Tensor:
    return torch.ops.s2o.attention(**call, **S2OConfig.of(config).arguments())


@given(st.lists(st.tuples(arguments, st.booleans(), st.booleans()), min_size=1, max_size=6))
def test_the_function_comes_to_what_the_operator_does(calls: list[tuple[dict[str, Any], bool, bool]]) -> None:
    names = ("threshold", "min_length", "settings", "site")
    given = [({name: x for name, x in call.items() if name not in names}, *others) for call, *others in calls]
    outcomes._found.clear()
    wanted = [result(by_operator, *call) for call in given]
    for _ in range(2):
        assert [result(attention, *call) for call in given] == wanted


@pytest.mark.parametrize("config", [None, S2OConfig(min_length=0, threshold=0.1), S2OConfig(min_length=10**6)])
def test_a_known_call_of_the_function_goes_past_the_dispatcher(
    config: S2OConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 300, 16) for heads in (4, 2, 2))
    want = by_operator(config, query=query, key=key, value=value, is_causal=True)
    monkeypatch.delattr("s2o_compile.ops.operator.validate")
    monkeypatch.setattr(Call, "of", None)
    assert torch.equal(attention(query, key, value, True, config=config), want)


def test_the_function_is_the_operator_where_it_is_traced() -> None:
    """What it remembers from eager calls says nothing of a graph."""
    x, targets = torch.randn(1, 2, 40, 8), []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    want = attention(x, x, x, is_causal=True)
    compiled = torch.compile(lambda x: attention(x, x, x, is_causal=True), backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), want)
    assert [str(target).removesuffix(".default") for target in targets] == ["s2o.attention"]


class Noting:
    """A mode that notes what is called inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def note(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.noted.append(str(function).removesuffix(".default"))
        return function(*args, **(kwargs or {}))


class FunctionsNoted(Noting, TorchFunctionMode):
    """Of functions."""

    __torch_function__ = Noting.note


class OperatorsNoted(Noting, TorchDispatchMode):
    """Of operators; in inference mode of those that are compositions too."""

    __torch_dispatch__ = Noting.note


@pytest.mark.parametrize("watching", [FunctionsNoted, OperatorsNoted])
@torch.inference_mode()
def test_a_mode_sees_the_operator_each_time(watching: type[FunctionsNoted] | type[OperatorsNoted]) -> None:
    x = torch.randn(1, 2, 40, 8)
    attention(x, x, x, is_causal=True)
    with watching() as mode:
        for _ in range(3):
            attention(x, x, x, is_causal=True)
    assert mode.noted == 3 * ["s2o.attention"]


def test_a_profiler_sees_the_operator_each_time() -> None:
    x = torch.randn(1, 2, 40, 8)
    for _ in range(2):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            attention(x, x, x, is_causal=True)
        assert "s2o::attention" in [event.key for event in profiled.key_averages()]


def test_a_subclass_decides_what_its_settings_are() -> None:
    class Forced(S2OConfig):
        def arguments(self) -> dict[str, Any]:
            return super().arguments() | {"min_length": 0}

    torch.manual_seed(0)
    x = torch.randn(1, 2, 300, 16)
    dense = attention(x, x, x, is_causal=True, config=S2OConfig(threshold=0.2))
    sparse = by_operator(S2OConfig(threshold=0.2, min_length=0), query=x, key=x, value=x, is_causal=True)
    for _ in range(2):
        assert torch.equal(attention(x, x, x, is_causal=True, config=Forced(threshold=0.2)), sparse)
    assert not torch.equal(sparse, dense)


def test_numbers_of_other_types_are_the_operators_each_time() -> None:
    """What equals a number that is remembered need not be taken for it."""
    x = torch.randn(1, 2, 40, 8)
    want = attention(x, x, x, is_causal=True, scale=0.25, window=8)
    for _ in range(2):
        assert torch.equal(attention(x, x, x, is_causal=True, scale=Fraction(1, 4), window=8), want)
        with pytest.raises(RuntimeError, match="window"):
            attention(x, x, x, is_causal=True, scale=0.25, window=8.0)  # type: ignore[call-overload]


@pytest.mark.parametrize("attend", [attention, torch.ops.s2o.attention])
def test_tangents_are_refused(attend: Callable[..., torch.Tensor]) -> None:
    """Forward derivatives, which are asked for where gradients are off too: they would be zero."""
    x = torch.randn(1, 2, 40, 8)
    attend(x, x, x)
    for config in ({}, {"sinks": torch.zeros(2)}):
        with pytest.raises(ValueError, match="query, key, value and sinks must not have tangents"), torch.no_grad():
            torch.func.jvp(lambda key, config=config: attend(x, key, x, **config), (x,), (x,))


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
    want = torch.stack([torch.ops.s2o.attention(x, x, x, is_causal=True) for x in x])
    for attend in (torch.ops.s2o.attention, attention):
        got = torch.func.vmap(lambda x, attend=attend: attend(x, x, x, is_causal=True))(x)
        torch.testing.assert_close(got, want)
