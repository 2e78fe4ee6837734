"""Whether a call is watched: what would see the operator, or take its place, does; elsewhere nothing differs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from s2o_compile.ops import operator
from s2o_compile.ops.surroundings import is_watched

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def draw(device: str = "cpu", length: int = 90) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, 16, generator=generator).to(device) for heads in (4, 2, 2)]


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = torch.ops.s2o.attention(query, key, value, is_causal=True, min_length=0)
    return output


class Dispatches(TorchDispatchMode):
    """The operators that reach the dispatcher's modes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        self.seen.append(str(operation))
        return operation(*arguments, **(named or {}))


def test_modes_see_the_operator() -> None:
    with Dispatches() as mode:
        attend(*draw())
    assert "s2o.sparse.default" in mode.seen


def test_profilers_name_the_operator() -> None:
    with profile() as profiled:
        attend(*draw())
    assert "s2o::sparse" in {event.name for event in profiled.events() or ()}


def test_graphs_have_the_operator() -> None:
    graphs = [make_fx(attend, tracing_mode=mode)(*draw()).graph for mode in ("real", "fake", "symbolic")]
    for graph in (*graphs, make_fx(torch.func.functionalize(attend))(*draw()).graph):
        assert torch.ops.s2o.sparse.default in {node.target for node in graph.nodes}
    assert "s2o::attention" in str(torch.jit.trace(attend, draw(), check_trace=False).graph)


@pytest.mark.parametrize("mode", [TorchDispatchMode, FakeTensorMode, enable_python_dispatcher, profile])
def test_what_watches(mode: Callable[[], AbstractContextManager[Any]]) -> None:
    tensors = draw()
    assert not is_watched(*tensors)
    with mode():
        assert is_watched(*tensors)
    assert not is_watched(*tensors)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("view", [torch._neg_view, torch.nn.Parameter, lambda x: x.to("meta")])
def test_tensors_that_are_not_plain(view: Callable[[torch.Tensor], torch.Tensor], place: int) -> None:
    tensors = draw()
    tensors[place] = view(tensors[place])
    assert is_watched(*tensors)


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize, torch.func.grad])
def test_transforms(transform: Callable[..., Any]) -> None:
    found: list[bool] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        found.append(is_watched(x, x, x))
        return x.sum()

    transform(note)(torch.ones(2))
    assert found == [True]


@pytest.mark.parametrize("place", range(3))
def test_views_that_are_still_to_be_negated(place: int) -> None:
    tensors = draw()
    views = [torch._neg_view(-x) if number == place else x for number, x in enumerate(tensors)]
    torch.testing.assert_close(attend(*views), attend(*tensors))


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients": nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocasts", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_calls_that_are_not_watched_give_what_the_dispatcher_gives(
    context: str, autocasts: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = []
    for watched in (False, True):
        with CONTEXTS[context](), torch.autocast(device, torch.bfloat16, enabled=autocasts):
            tensors = draw(device)
            assert not is_watched(*tensors)
            if watched:
                monkeypatch.setattr(operator, "is_watched", lambda *_: True)
            outputs.append(attend(*tensors))
    one, other = outputs
    assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
    assert one.is_inference() == other.is_inference() and not one.requires_grad


@pytest.mark.parametrize("watched", [False, True])
def test_errors_are_those_of_the_dispatcher(watched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("the implementation is broken")

    monkeypatch.setattr(operator, "_attend_by_torch", fail)
    if watched:
        monkeypatch.setattr(operator, "is_watched", lambda *_: True)
    with pytest.raises(RuntimeError, match="the implementation is broken"):
        attend(*draw())
    query, key, value = draw()
    with pytest.raises(ValueError, match="must not require gradients"):
        attend(query.requires_grad_(), key, value)
