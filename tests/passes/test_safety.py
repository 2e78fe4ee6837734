"""An error in any pass leaves the graph as Dynamo made it."""

from __future__ import annotations

import pkgutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile.passes import Decision, rewrite
from s2o_compile.passes.graph.nested import nested_graphs
from s2o_compile.passes.safety import RAISE_ERRORS, Safeguard

from .capture import EXACT, inputs

PASSES = [
    "arguments.Emitter.predicate",
    "arguments.emit_size",
    "match.find.handwritten_site",
    "replace.Replacer.erase",
    "replace.Replacer.laid_out",
    "rewrite.Prover.prove",
    "rewrite.Walker.operands",
    "rewrite.Writes.__init__",
    "rewrite.Writes.readers",
    "rewrite.decompose",
    "rewrite.find_attention",
    "rewrite.site_name",
]
"""The functions that a pass begins with, or that others call in the middle of their work."""


class Failure(Exception):
    """What no pass expects."""


class Model(torch.nn.Module):
    """Attention of all kinds: calls with masks, written out, hidden in a module, and in a nested graph."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = torch.nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        length, padding = q.shape[2], keep[:, None, None]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        x = sdpa(q, k, v, attn_mask=padding & causal)
        x = torch.cond(x.sum() > 0, self.branch, lambda x, k, v: x.clone(), (x, k, v))
        x = torch.softmax((x @ k.transpose(-1, -2)).masked_fill(~causal, -torch.inf), -1) @ v
        return self.hidden(x[:, 0], k[:, 0], v[:, 0], need_weights=False)[0]

    def branch(self, x: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(x, k, v, is_causal=True)


def described(module: GraphModule) -> list[tuple[Any, ...]]:
    """All that a compiler can tell of the graphs of a module."""
    found: list[tuple[Any, ...]] = []
    for node in (node for graph in nested_graphs(module) for node in graph.graph.nodes):
        identities = map(id, [*node.meta.values(), getattr(node, "_dynamo_source", None)])
        texts = map(str, (node.target, node.args, node.kwargs, list(node.users)))
        found.append((node.op, node.name, node.type, *texts, *identities))
    return found


class Backend:
    """Rewrites graphs under a safeguard and runs them as they are then."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.untouched = True

    def __call__(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        before = described(module)
        self.decisions += Safeguard(module).run(lambda: rewrite(module, EXACT, fuse_dense=True), list)
        for graph in nested_graphs(module):
            graph.graph.lint()
        self.untouched &= described(module) == before
        return module.forward


@pytest.fixture
def arguments() -> list[torch.Tensor]:
    return [*inputs(), torch.arange(20) < torch.tensor([[20], [15]])]


def compiled(model: Model, args: list[torch.Tensor]) -> tuple[Backend, torch.Tensor]:
    backend = Backend()
    torch._dynamo.reset()
    with torch.no_grad():
        return backend, torch.compile(model, backend=backend)(*args)


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> list[int]:
    """Let one call of a function fail; the returned list counts its calls."""
    owner, _, attribute = f"s2o_compile.passes.{name}".rpartition(".")
    found = pkgutil.resolve_name(owner)
    original, calls = getattr(found, attribute), list[int]()

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise Failure("no pass expects this\nnor this")
        return original(*args, **kwargs)

    monkeypatch.setattr(found, attribute, failing)
    return calls


def test_the_model_is_rewritten(arguments: list[torch.Tensor]) -> None:
    """Else the others say nothing."""
    model = Model().eval()
    backend, output = compiled(model, arguments)
    assert [decision.rewritten for decision in backend.decisions] == [True] * 4
    assert not backend.untouched
    with torch.no_grad():
        torch.testing.assert_close(output, model(*arguments))


@pytest.mark.parametrize("name", PASSES)
def test_an_error_in_a_pass(name: str, arguments: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """In its last call, when much was rewritten before."""
    model = Model().eval()
    with monkeypatch.context() as patch:
        calls = fail_at(patch, name, 0)
        compiled(model, arguments)
    assert calls, "the pass is not called"
    monkeypatch.setenv(RAISE_ERRORS, "")
    fail_at(monkeypatch, name, len(calls))
    with pytest.warns(RuntimeWarning, match=r"Failure: no pass expects this\. .* Please report") as caught:
        backend, output = compiled(model, arguments)
    assert sum("Please report" in str(warning.message) for warning in caught) == 1
    assert backend.untouched and backend.decisions == []
    with torch.no_grad():
        torch.testing.assert_close(output, model(*arguments), rtol=0, atol=0)


def test_errors_are_raised_on_request(arguments: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RAISE_ERRORS, "1")
    fail_at(monkeypatch, "rewrite.find_attention", 2)
    with pytest.raises(Exception, match="no pass expects this"):
        compiled(Model().eval(), arguments)


def test_expected_errors_come_through() -> None:
    module = torch.fx.symbolic_trace(torch.nn.ReLU())

    def action() -> int:
        raise KeyError("asked for")

    with warnings.catch_warnings(), pytest.raises(KeyError, match="asked for"):
        warnings.simplefilter("error")
        Safeguard(module).run(action, lambda: 1, KeyError)
