"""Attention that stays dense: masks that are proven are not computed, and change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile import S2OConfig
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH
from s2o_compile.passes import Decision, rewrite

LENGTH = 1031
"""So many queries and keys that a mask of all is large."""


class Dense:
    """A backend that rewrites nothing to be sparse, as all calls are short, and runs the graphs eagerly."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.module: GraphModule | None = None

    def __call__(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.decisions += rewrite(module, S2OConfig(min_length=DENSE_AT_ANY_LENGTH), fuse_dense=True)
        self.module = module
        return module.forward

    def calls(self, target: Any) -> list[dict[str, Any]]:
        """The keyword arguments of each call of an operator that is left."""
        assert self.module is not None
        return [dict(node.kwargs) for node in self.module.graph.find_nodes(op="call_function", target=target)]


def inputs(queries: int = LENGTH, keys: int = LENGTH, kv_heads: int = 1) -> list[Tensor]:
    torch.manual_seed(queries)
    return [torch.randn(2, heads, length, 16) for heads, length in ((2, queries), (kv_heads, keys), (kv_heads, keys))]


def causal(q: Tensor, k: Tensor, device: str | None = None) -> Tensor:
    rows, columns = (torch.arange(x.shape[2], device=q.device) for x in (q, k))
    return columns <= rows[:, None] + (k.shape[2] - q.shape[2])


def padding(q: Tensor, hidden: int = 300) -> Tensor:
    """Padding [B, Lk]: of the first entry at the left, of none of the second."""
    kept = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool)
    kept[0, :hidden] = False
    return kept


def by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, causal(q, k), enable_gqa=True)


def by_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[2], k.shape[2]).masked_fill(~causal(q, k), -math.inf)
    return sdpa(q, k, v, mask, scale=0.3, enable_gqa=True)


def by_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = (torch.arange(x.shape[2]) for x in (q, k))
    return sdpa(q, k, v, causal(q, k) & (rows[:, None] - columns < 100), enable_gqa=True)


def by_padding(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    mask = causal(q, k) & kept[:, None, None]
    # As transformers does for queries that see no key, which would be NaN in some releases.
    return sdpa(q, k, v, mask, enable_gqa=True)


def by_documents(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    same = documents[:, :, None] == documents[:, None]
    return sdpa(q, k, v, (causal(q, k) & same)[:, None], enable_gqa=True)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~causal(q, k), -math.inf)
    return scores.softmax(-1) @ v


def everything(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), enable_gqa=True)


DOCUMENTS = (torch.arange(LENGTH) // 400).expand(2, -1)
CASES: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "causal": (by_mask, inputs()),
    "bottom right": (by_mask, inputs(600, 1800)),
    "infinity": (by_infinity, inputs()),
    "window": (by_window, inputs()),
    "padding": (by_padding, [*inputs(), padding(inputs()[0])]),
    "documents": (by_documents, [*inputs(), DOCUMENTS]),
    "written out": (written_out, inputs(kv_heads=2)),
    "everything": (everything, inputs()),
}


def compiled(function: Callable[..., Any], args: list[Tensor], dynamic: bool = False) -> Dense:
    """The backend, once the function is compiled and computes what it does eagerly."""
    torch._dynamo.reset()
    backend = Dense()
    result = torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    torch.testing.assert_close(result, function(*args), atol=2e-6, rtol=1e-5)
    return backend


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_proven_mask_is_not_computed(case: str, dynamic: bool) -> None:
    backend = compiled(*CASES[case], dynamic=dynamic)
    (decision,) = backend.decisions
    assert decision.unmasked and not decision.rewritten and decision.kind == "dense, no mask"
    assert "fewer than min_length" in decision.reason
    (arguments,) = backend.calls(torch.ops.s2o.attention.default)
    assert "mask" not in arguments
    assert not backend.calls(sdpa)
    assert backend.module is not None
    large = [
        node for node in backend.module.graph.nodes
        if isinstance(value := node.meta.get("example_value"), torch.Tensor)
        and node.op != "placeholder" and value.dtype == torch.bool and value.dim() >= 2 and not dynamic
        and min(value.shape[-2:]) > 2
    ]  # fmt: skip
    assert not large


@torch.no_grad()
def test_what_runs_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the operators of a CPU: no tensor of all queries and keys is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(x, Tensor):
                    largest = max(largest, x.untyped_storage().nbytes())
            return result

    q, k, v = inputs(2000, 2000)
    for terms in (
        {"is_causal": True, "key_padding": padding(q, 500)},
        {"is_causal": True, "window": 300},
        {"is_causal": True, "query_documents": (d := torch.arange(2000).expand(2, -1) // 700), "key_documents": d},
    ):
        with Watch():
            torch.ops.s2o.attention(q, k, v, **terms)
        assert largest < 2000 * 2000


@pytest.mark.parametrize(
    ("function", "args"),
    [
        pytest.param(by_mask, inputs(200, 200), id="small"),
        pytest.param(by_mask, inputs(1, 5000), id="decoding"),
        pytest.param(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), inputs(), id="no mask"),
        pytest.param(
            lambda q, k, v, m: sdpa(q, k, v, m, enable_gqa=True),
            [*inputs(), torch.rand(LENGTH, LENGTH) > 0.2],
            id="not proven",
        ),
    ],
)
@torch.no_grad()
def test_left_as_it_is(function: Callable[..., Tensor], args: list[Tensor]) -> None:
    backend = compiled(function, args)
    (decision,) = backend.decisions
    assert not decision.unmasked and decision.kind == "dense"
    assert len(backend.calls(sdpa)) == 1 and not backend.calls(torch.ops.s2o.attention.default)


def test_training_loses_the_causal_mask() -> None:
    args = [x.requires_grad_() for x in inputs(70, 70)]
    backend = Dense()
    torch._dynamo.reset()
    results = []
    for function in (torch.compile(by_mask, backend=backend), by_mask):
        output = function(*args)
        results.append((output, torch.autograd.grad((output * torch.linspace(-1, 1, 16)).sum(), args)))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    (arguments,) = backend.calls(sdpa)
    assert arguments["is_causal"] is True and "attn_mask" not in arguments


def test_training_keeps_other_masks() -> None:
    args = [x.requires_grad_() for x in inputs()]
    backend = Dense()
    torch._dynamo.reset()
    torch.compile(by_window, backend=backend)(*args)
    assert len(backend.calls(sdpa)) == 1 and not backend.calls(torch.ops.s2o.attention.default)


def test_sites_of_a_calibration_that_stay_dense_lose_their_mask_too() -> None:
    from s2o_compile.passes import Refused

    def refuse(name: str) -> S2OConfig:
        raise Refused("the calibration leaves it dense")

    decisions: list[Decision] = []

    def backend(module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        decisions.extend(rewrite(module, S2OConfig(min_length=0), refuse, fuse_dense=True))
        return module.forward

    torch._dynamo.reset()
    args = inputs()
    with torch.no_grad():
        result = torch.compile(by_mask, backend=backend)(*args)
        torch.testing.assert_close(result, by_mask(*args), atol=2e-6, rtol=1e-5)
    assert decisions[0].unmasked and decisions[0].reason == "the calibration leaves it dense"
