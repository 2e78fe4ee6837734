"""Attention that is written out and stays dense: SDPA where it is proven, and else as it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import dropout
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile import S2OConfig
from s2o_compile.passes import Decision, rewrite

from .test_inductor_patterns import CASES, SIZES, called, inputs, masks, tolerances

Sizes = tuple[int, int, int]
ONE_SIZE = [(number, dtype, size) for number, dtype, size in CASES if size == SIZES[number % 2]]


class Fusing:
    """A backend that rewrites nothing to be sparse, as all calls are short, and runs the graphs eagerly."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.fused = 0

    def __call__(self, module: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.decisions += rewrite(module, S2OConfig(min_length=2**20), fuse_dense=True)
        self.fused += len(module.graph.find_nodes(op="call_function", target=sdpa))
        return module.forward


def fused(function: Callable[..., Any], args: list[Tensor], **tolerance: float) -> int:
    """How many calls of SDPA a function becomes, once outputs and gradients are those of the function itself."""
    backend = Fusing()
    compiled = torch.compile(function, backend=backend)
    results = [run(function, args) for function in (compiled, function)]
    torch.testing.assert_close(*results, **tolerance)
    assert not any(decision.rewritten for decision in backend.decisions)
    return backend.fused


def run(function: Callable[..., Any], args: list[Tensor]) -> Any:
    """Outputs, and the gradients of inputs that need any."""
    output = function(*args)
    inputs = [x for x in args if x.requires_grad]
    if not inputs:
        return output
    first = output[0] if isinstance(output, tuple) else output
    weights = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).view_as(first)
    return output, torch.autograd.grad(first, inputs, weights, allow_unused=True)


def tensors(*shape: int, gradients: bool = True) -> list[Tensor]:
    return [torch.randn(*(shape or (2, 4, 8, 8)), requires_grad=gradients) for _ in range(3)]


@pytest.mark.parametrize(("number", "dtype", "size"), ONE_SIZE, ids=str)
@torch.no_grad()
def test_patterns_of_inductor_in_inference(number: int, dtype: torch.dtype, size: Sizes) -> None:
    assert fused(called(number, size), inputs(number, dtype, *size), **tolerances(dtype)) == 1


@pytest.mark.parametrize(("number", "dtype", "size"), [case for case in ONE_SIZE if case[1] == torch.float32], ids=str)
def test_patterns_of_inductor_in_training(number: int, dtype: torch.dtype, size: Sizes) -> None:
    """Padding may hide all keys of a query, whose gradients SDPA gives another way."""
    args = [x.requires_grad_(x.is_floating_point()) for x in inputs(number, dtype, *size)]
    assert fused(called(number, size), args, atol=1e-5, rtol=1e-5) == ("padding" not in masks(number))


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * 0.25


def causal(q: Tensor, k: Tensor, v: Tensor, below: float = -math.inf, offset: int = 0) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1 + offset)
    return torch.softmax(scores(q, k).masked_fill(hidden, below), -1) @ v


def window(q: Tensor, k: Tensor, v: Tensor, width: int = 3) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return torch.softmax(scores(q, k).masked_fill((distance < 0) | (distance >= width), -math.inf), -1) @ v


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k[:, :2].repeat_interleave(2, 1), v[:, :2].repeat_interleave(2, 1))


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    "attend",
    [
        causal,
        window,
        grouped,
        lambda q, k, v: causal(q, k, v, -1e9),
        lambda q, k, v: causal(q, k, v, offset=2),
        lambda q, k, v: torch.softmax(scores(q, k.transpose(-1, -2)), -1) @ v,
        lambda q, k, v: torch.softmax(scores(q.transpose(1, 2), k.permute(0, 2, 1, 3)), -1) @ v.transpose(1, 2),
    ],
)
def test_masks(attend: Callable[..., Tensor], gradients: bool) -> None:
    assert fused(attend, tensors(gradients=gradients)) == 1


def test_more_queries_than_keys_of_a_window() -> None:
    """Late queries see no key: not a number in the model."""
    q, k, v = tensors()
    args = [q, *(x[:, :, :3].detach().requires_grad_() for x in (k, v))]
    assert fused(window, args, equal_nan=True) == 0


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: torch.softmax(scores(q, k), -2) @ v,
        lambda q, k, v: torch.softmax(scores(q, k), 1) @ v,
        lambda q, k, v: torch.softmax(torch.tanh(scores(q, k)), -1) @ v,
        lambda q, k, v: torch.softmax(scores(q, k) * -1, -1) @ v,
        lambda q, k, v: torch.softmax(scores(q, k) * 0, -1) @ v,
        lambda q, k, v: torch.softmax(scores(q, k) + q[:, :, :, :1], -1) @ v,
        lambda q, k, v: (lambda weights: weights @ v + weights.sum())(torch.softmax(scores(q, k), -1)),
        lambda q, k, v: causal(q, k, v, -1.0),
        lambda q, k, v: dropout(torch.softmax(scores(q, k), -1), 1e-9) @ v,
        lambda q, k, v: torch.softmax(scores(q, k).detach(), -1) @ v,
        lambda q, k, v: torch.softmax(scores(q, k), -1).detach() @ v,
    ],
)
def test_what_is_not_sdpa(attend: Callable[..., Tensor]) -> None:
    """Softmax over other dimensions, other operands, caps, scales, masks; gradients that stop within."""
    assert fused(attend, tensors()) == 0


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: torch.softmax(scores(q.detach(), k), -1) @ v,
        lambda q, k, v: torch.softmax(scores(q, k), -1) @ v.detach(),
    ],
)
def test_gradients_that_stop_before(attend: Callable[..., Tensor]) -> None:
    """SDPA takes the detached operands."""
    assert fused(attend, tensors()) == 1


def test_gradients_that_are_off_within() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = torch.softmax(scores(q, k), -1)
        return weights @ v

    assert fused(attend, tensors()) == 0


def test_rows_without_keys_in_inference() -> None:
    """As in the operator they give zeros, not something that is not a number."""
    keep = torch.ones(2, 8, dtype=torch.bool)
    keep[0] = False

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return torch.softmax(scores(q, k).masked_fill(~keep[:, None, None], -math.inf), -1) @ v

    args = [*tensors(gradients=False), keep]
    backend = Fusing()
    with torch.no_grad():
        output = torch.compile(attend, backend=backend)(*args)
        torch.testing.assert_close(output, attend(*args).nan_to_num(0))
    assert backend.fused == 1
