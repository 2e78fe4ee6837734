"""Programs with transforms of torch.func: what the passes cannot read there, they leave alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn import functional as F

from .capture import Capture
from .compare import compare

sdpa = F.scaled_dot_product_attention
LINEAR = nn.Linear(4, 3)
MASKS = torch.rand(3, 12, 12) > 0.3
PARAMETERS = {name: parameter.detach() for name, parameter in LINEAR.named_parameters()}


def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(LINEAR, parameters, (x,)).sin().sum()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * 0.3, -1) @ v


def scaled_by_a_tensor(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * scale, -1) @ v


def changed_in_place(y: Tensor) -> Tensor:
    z = y * 2
    z.unsqueeze_(0)
    z.mul_(3)
    return (z.squeeze_(0) * y).sum()


WITHOUT_ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "jvp": lambda x: jvp(torch.sin, (x,), (x,)),
    "grad": lambda x: grad(lambda y: y.sin().sum())(x),
    "vjp": lambda x: vjp(torch.sin, x)[1](x),
    "hessian": lambda x: hessian(lambda y: (y.sin() * y).sum())(x),
    "jacrev": lambda x: jacrev(torch.sin)(x),
    "jacfwd": lambda x: jacfwd(torch.sin)(x),
    "linearize": lambda x: linearize(torch.sin, x)[1](x),
    "functional_call": lambda x: functional_call(LINEAR, PARAMETERS, (x,)),
    "grad of grad": lambda x: grad(lambda y: grad(lambda z: (z.sin() * z).sum())(y).sum())(x),
    "vmap of grad": lambda x: vmap(grad(loss, argnums=1), (None, 0))(PARAMETERS, torch.stack([x, x * 2])),
    "gradients of samples": lambda x: vmap(grad(loss), (None, 0))(PARAMETERS, torch.stack([x, x * 2])),
    "grad of vmap": lambda x: grad(lambda y: vmap(torch.sin)(y).sum())(x),
    "in place": lambda x: grad(changed_in_place)(x),
    "einsum": lambda x: grad(lambda y: torch.einsum("i,j->ij", y, y).softmax(-1).sum())(x),
    "product": lambda x: jvp(lambda y: torch.softmax(y[:, None] @ y[None], -1) @ y[:, None], (x,), (x,)),
    "scalars": lambda x: (x[0].exp() / x[0].exp().sum(0, keepdim=True), x[0].repeat_interleave(2), x[0].movedim(0, 0)),
    "movements": lambda x: grad(lambda y: torch.cat([y, y]).repeat_interleave(2, 0).movedim(0, 0).sum())(x),
}


@pytest.mark.parametrize("name", WITHOUT_ATTENTION)
def test_without_attention(name: str) -> None:
    captured = compare(WITHOUT_ATTENTION[name], [torch.randn(4)])
    assert not any(decision.rewritten for decision in captured.decisions)


@pytest.mark.parametrize(
    "name", ["jvp", *(pytest.param(x, marks=pytest.mark.slow) for x in ("grad", "vmap of grad")), "hessian"]
)
def test_with_inductor(name: str) -> None:
    x = torch.randn(4)
    compiled = torch.compile(WITHOUT_ATTENTION[name], backend="s2o")
    torch.testing.assert_close(compiled(x), WITHOUT_ATTENTION[name](x))


def _inputs(*batch: int) -> list[Tensor]:
    return [torch.randn(*batch, 2, 2, 12, 8) for _ in range(3)]


WITH_ATTENTION: dict[str, tuple[Callable[..., Any], list[Tensor]]] = {
    "vmap of sdpa": (vmap(sdpa), _inputs(3)),
    "vmap of products": (vmap(attend), _inputs(3)),
    "vmap of products and scales": (vmap(scaled_by_a_tensor), [*_inputs(3), torch.rand(3)]),
    "vmap of keys": (lambda q, k, v: vmap(lambda x: sdpa(q[0], x, v[0]))(k), _inputs(3)),
    "vmap of masks": (lambda q, k, v, m: vmap(lambda x: sdpa(q, k, v, x))(m), [*_inputs(), MASKS]),
    "vmap of all": (vmap(sdpa), [*_inputs(3), MASKS]),
    "vmap of products and masks": (
        vmap(lambda q, k, v, m: (q @ k.mT).masked_fill(m, -math.inf).softmax(-1) @ v),
        [*_inputs(3), ~MASKS],
    ),
    "vmap of padding": (
        vmap(lambda q, k, v, m: sdpa(q, k, v, m[:, None, None])),
        [*_inputs(3), torch.ones(3, 2, 12, dtype=torch.bool)],
    ),
    "vmap of a module": (vmap(nn.MultiheadAttention(8, 2, batch_first=True).eval()), [x[:, 0] for x in _inputs(3)]),
    "grad of sdpa": (lambda q, k, v: grad(lambda x: sdpa(x, k, v).sum())(q), _inputs()),
    "grad of products": (lambda q, k, v: grad(lambda x: attend(x, k, v).sum())(q), _inputs()),
    "jvp of products": (lambda q, k, v: jvp(lambda x: attend(x, k, v), (q,), (q,)), _inputs()),
    "grad around sdpa": (lambda q, k, v: grad(lambda x: (x * sdpa(v, k, v)).sum())(q), _inputs()),
    "sdpa beside grad": (lambda q, k, v: (grad(lambda x: (x * x).sum())(q), sdpa(q, k, v)), _inputs()),
    "sdpa of gradients": (lambda q, k, v: sdpa(grad(lambda x: (x * x).sum())(q), k, v), _inputs()),
}
REWRITTEN = {"vmap of sdpa", "vmap of products", "vmap of keys", "sdpa beside grad", "sdpa of gradients"}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_with_attention(name: str) -> None:
    function, args = WITH_ATTENTION[name]
    captured = compare(function, args)
    assert any(decision.rewritten for decision in captured.decisions) == (name in REWRITTEN)


@pytest.mark.parametrize(
    "name", ["vmap of products", pytest.param("vmap of masks", marks=pytest.mark.slow), "grad of sdpa"]
)
def test_with_attention_and_inductor(name: str) -> None:
    function, args = WITH_ATTENTION[name]
    with torch.no_grad():
        compiled = torch.compile(function, backend="s2o", options={"threshold": 0.0, "min_length": 0})
        torch.testing.assert_close(compiled(*args), function(*args))


def test_why_a_site_is_left() -> None:
    for name, reason in {
        "grad of sdpa": "query is differentiated by torch.func",
        "vmap of masks": "is another for each of what torch.vmap maps over",
    }.items():
        captured = Capture()
        function, args = WITH_ATTENTION[name]
        torch.compile(function, backend=captured)(*args)
        assert reason in captured.only().reason


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_attention_under_vmap_that_needs_gradients_stays_dense() -> None:
    def mapped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return vmap(lambda *tensors: sdpa(*(x * 1 for x in tensors)))(*(torch.stack([x, x]) for x in (q, k, v)))

    tensors = [torch.randn(2, 4, 13, 8, requires_grad=True) for _ in "qkv"]
    captured = Capture()
    torch.testing.assert_close(torch.compile(mapped, backend=captured)(*tensors), mapped(*tensors))
    assert "gradients are needed" in captured.only().reason
