"""Attention in graphs that a graph calls, in several graphs of one model, and in a part of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from s2o_compile import explain

from .capture import EXACT, Capture, capture, inputs
from .compare import Recorded, compare
from .models import tiny, tokens

LENGTHS = [(13, 23), (11, 11), (5, 37), (29, 29), (17, 31)]


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, is_causal=True)


def handwritten(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.transpose(-2, -1)).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def called_twice(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A region that stays one graph, which Dynamo would put in place were it called once."""
    region = torch.compiler.nested_compile_region(attend)
    return lambda q, k, v: region(region(q, k, v), k, v)


def checkpointed(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: checkpoint(attend, q, k, v, use_reentrant=False) + 1


def branched(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: torch.cond(q.sum() > 0, attend, lambda q, k, v: q * 2, (q, k, v))


def checkpointed_in_a_region(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return called_twice(checkpointed(attend))


NESTED = [called_twice, checkpointed, branched, checkpointed_in_a_region]


def compare_at(function: Callable[..., Any], dynamic: bool) -> Recorded:
    """Compare a function with itself compiled, at several lengths if `dynamic`, and check that it is compiled once."""
    calls = [inputs(queries=queries, keys=keys) for queries, keys in LENGTHS[: None if dynamic else 1]]
    captured = compare(function, *calls, dynamic=dynamic)
    assert len(captured.modules) == 1
    return captured


def regions(captured: Recorded) -> int:
    """How many graphs of regions were compiled: torch 2.11 has one for each call where lengths are dynamic."""
    calls = [node for node in captured.nodes() if node.target is torch.ops.higher_order.invoke_subgraph]
    return max(len({call.all_input_nodes[0].target for call in calls}), 1)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", [causal, handwritten])
@pytest.mark.parametrize("nested", NESTED)
def test_rewritten(nested: Callable[..., Any], attend: Callable[..., Tensor], dynamic: bool) -> None:
    captured = compare_at(nested(attend), dynamic)
    assert len(captured.decisions) == regions(captured)
    for decision in captured.decisions:
        assert decision.rewritten, decision.reason
        assert decision.mask == "causal, offset 0"
        assert decision.location.startswith("test_nested.py:")
    assert captured.operators() == []


@pytest.mark.parametrize("dynamic", [False, True])
def test_both_branches(dynamic: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(q.sum() > 0, causal, sdpa, (q, k, v))

    masks = [decision.mask for decision in compare_at(function, dynamic).decisions]
    assert masks == ["causal, offset 0", "everything"]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_from_outside(dynamic: bool) -> None:
    @torch.compiler.nested_compile_region
    def region(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return sdpa(q, k, v, mask)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        return region(region(q, k, v, mask), k, v, mask)

    captured = compare_at(function, dynamic)
    assert [item.mask for item in captured.decisions] == ["boolean mask from input mask"] * regions(captured)


def test_gradients_through_a_checkpoint() -> None:
    args, captured = [x.requires_grad_() for x in inputs()], Capture()
    torch.compile(checkpointed(causal), backend=captured)(*args).sum().backward()
    assert "torch.no_grad()" in captured.only().reason


def test_sites_of_nested_graphs_are_measured() -> None:
    report = explain(called_twice(causal), *inputs(), config=EXACT, measure=True)
    (decision,) = report.decisions
    assert decision.dense_pairs is not None
    once = explain(causal, *inputs(), config=EXACT, measure=True).decisions[0].dense_pairs
    assert decision.dense_pairs == 2 * (once or 0)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return causal(*self.project(x).chunk(3, -1)) + x


def test_names_of_regions() -> None:
    model = nn.Sequential(Layer(), Layer())
    captured, _ = capture(model, inputs()[0])
    assert captured.decisions and all(decision.rewritten for decision in captured.decisions)
    assert captured.decisions[0].name == "0"


@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_breaks(dynamic: bool) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output = causal(q, k, v)
        torch._dynamo.graph_break()
        return sdpa(output, k, v)

    calls = [inputs(queries=queries, keys=keys) for queries, keys in LENGTHS[: None if dynamic else 1]]
    captured = compare(function, *calls, dynamic=dynamic)
    assert len(captured.modules) == 2
    assert [decision.mask for decision in captured.decisions] == ["causal, offset 0", "everything"]


def test_a_compiled_part() -> None:
    model, ids, captured = tiny("llama"), tokens(40), Capture()
    with torch.no_grad():
        expected = model(ids).logits
        model.model.layers[1].self_attn.compile(backend=captured)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert captured.only().rewritten


def test_settings_of_each_compilation() -> None:
    thresholds = [0, 0.5]
    for threshold in thresholds:
        captured, _ = capture(causal, *inputs(), config=dataclasses.replace(EXACT, threshold=threshold))
        (operator,) = captured.operators()
        assert operator.kwargs["threshold"] == threshold


@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("nested", [*(pytest.param(x, marks=pytest.mark.slow) for x in NESTED[:-2]), *NESTED[-2:]])
def test_through_inductor(nested: Callable[..., Any], dynamic: bool) -> None:
    function = nested(causal)
    compiled = torch.compile(function, backend="s2o", options=EXACT.to_dict(), fullgraph=True, dynamic=dynamic)
    with torch.no_grad():
        for queries, keys in LENGTHS[: 2 if dynamic else 1]:
            args = inputs(queries=queries, keys=keys)
            torch.testing.assert_close(compiled(*args), function(*args))
