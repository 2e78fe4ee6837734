"""Shapes and needs of gradients that are changed in place: what is read of a node is as it was when it was computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .capture import Capture
from .compare import assert_refused, assert_rewritten, compare

BATCH = HEADS = 4
LENGTH = 17
PADDING = "key padding"
sdpa = F.scaled_dot_product_attention
WEIGHT = torch.randn(8, 8, requires_grad=True)


def inputs(length: int = LENGTH) -> list[Tensor]:
    """Query, key, value, and numbers of which the positive ones are kept; batch and heads are the same in number."""
    keep = torch.rand(BATCH, length) - 0.4
    keep[:, 0] = 1
    return [*(torch.randn(BATCH, HEADS, length, 8) for _ in range(3)), keep]


def attend(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.3).masked_fill(~m, -math.inf).softmax(-1) @ v


def squeezed_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    m = (keep > 0)[:, None, None]
    output = sdpa(q, k, v, m)
    m.squeeze_(1)
    return output, m


def unsqueezed_before(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    m = (keep > 0)[:, None]
    m.unsqueeze_(1)
    return sdpa(q, k, v, m)


def unsqueezed_in_a_chain(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return attend(q, k, v, (keep > 0).unsqueeze_(1).unsqueeze_(1))


def unsqueezed_before_and_squeezed_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    m = keep.cumsum(1) > 0
    m.unsqueeze_(1)
    m.unsqueeze_(1)
    output = attend(q, k, v, m)
    m.squeeze_(1).squeeze_(1).unsqueeze_(1)
    return output, m


def unsqueezed_as_another_name(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    m = (keep > 0)[:, None]
    m.contiguous().unsqueeze_(1)
    return sdpa(q, k, v, m)


def unsqueezed_before_it_is_compared(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    m = keep * 1
    m.unsqueeze_(1)
    m.add_(0.1)
    return sdpa(q, k, v, (m > 0).unsqueeze_(1))


def strided_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    m = (keep > 0)[:, None, None]
    output = sdpa(q, k, v, m)
    m.as_strided_((2, 2), (1, 1))
    return output, m


def one_of_a_tuple(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    first, second = torch.stack([keep > 0, keep > 0.3]).unbind(0)
    output = sdpa(q, k, v, first[:, None, None])
    first.unsqueeze_(1)
    return output, first, second


def one_of_a_tuple_that_is_used_later(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    both = torch.cat([keep > 0, keep > 0.3]).chunk(2)
    both[1].unsqueeze_(1)
    joined = torch.cat([both[0], both[1][:, 0]])
    return sdpa(q, k, v, joined[:BATCH, None, None]), both


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "function",
    [
        squeezed_after,
        unsqueezed_before,
        unsqueezed_in_a_chain,
        unsqueezed_before_and_squeezed_after,
        unsqueezed_as_another_name,
        unsqueezed_before_it_is_compared,
        strided_after,
        one_of_a_tuple,
        one_of_a_tuple_that_is_used_later,
    ],
)
def test_shape_of_a_mask(function: Callable[..., Any], dynamic: bool) -> None:
    lengths = (17, 23, 11) if dynamic else (LENGTH,)
    assert_rewritten(function, *map(inputs, lengths), mask=PADDING, dynamic=dynamic)


def transposed_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    m = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu()
    m.transpose_(0, 1)
    return sdpa(q, k, v, m)


def triangle_transposed_after(q: Tensor, k: Tensor, v: Tensor) -> Any:
    m = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    output = sdpa(q, k, v, m)
    m.t_()
    return output, m


@pytest.mark.parametrize("function", [transposed_triangle, triangle_transposed_after])
def test_order_of_a_mask(function: Callable[..., Any]) -> None:
    assert compare(function, inputs()[:3]).only().mask == "causal, offset 0"


def query_transposed_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q.transpose(1, 2) * 1.0
    x.transpose_(1, 2)
    return sdpa(x, k, v)


def query_transposed_before_and_after(q: Tensor, k: Tensor, v: Tensor) -> Any:
    x = q.transpose(1, 2) * 1.0
    x.transpose_(1, 2)
    output = torch.softmax(x @ k.mT, -1) @ v
    x.swapdims_(1, 2)
    return output, x


def key_transposed_before(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = k * 1.0
    x.transpose_(-1, -2)
    return torch.softmax(q @ x, -1) @ v


def key_transposed_between(q: Tensor, k: Tensor, v: Tensor) -> Any:
    x = k * 1.0
    scores = q @ x.transpose(-1, -2)
    x.swapaxes_(-1, -2)
    return torch.softmax(scores, -1) @ v, x


def output_transposed_after(q: Tensor, k: Tensor, v: Tensor) -> Any:
    y = sdpa(q, k, v)
    flat = y.view(-1)
    y.transpose_(1, 2)
    y.add_(1)
    return y, flat


def one_of_a_tuple_of_inputs(q: Tensor, k: Tensor, v: Tensor) -> Any:
    parts = (torch.stack([q, k, v]) * 2).unbind(0)
    query = parts[0]
    query.transpose_(1, 2)
    return sdpa(query.transpose(1, 2), parts[1], parts[2]), parts


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "function",
    [
        query_transposed_before,
        query_transposed_before_and_after,
        key_transposed_before,
        key_transposed_between,
        output_transposed_after,
        one_of_a_tuple_of_inputs,
    ],
)
def test_inputs_and_output(function: Callable[..., Any], dynamic: bool) -> None:
    lengths = (17, 23, 11) if dynamic else (LENGTH,)
    assert_rewritten(function, *(inputs(length)[:3] for length in lengths), dynamic=dynamic)


def of_einsum(w: Tensor) -> Tensor:
    m = torch.einsum("bi,bj->bij", w, w)
    m.unsqueeze_(1)
    return m


def of_bmm(w: Tensor) -> Tensor:
    m = torch.bmm(w[:, :, None], w[:, None, :])
    m.unsqueeze_(1)
    return m


def of_matmul(w: Tensor) -> Tensor:
    m = w[:, None] @ w[:, :, None]
    m.squeeze_(1)
    return m.squeeze_(-1)


@pytest.mark.parametrize("function", [of_einsum, of_bmm, of_matmul])
def test_products_that_are_no_attention(function: Callable[[Tensor], Tensor]) -> None:
    captured = compare(function, [torch.randn(2, 8)])
    assert captured.decisions == []


def memory_replaced_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    m = (keep > 0)[:, None, None]
    output = sdpa(q, k, v, m)
    m.set_(keep > 2)
    return output, m


def test_what_cannot_be_followed_is_refused() -> None:
    assert_refused(memory_replaced_after, inputs(), reason="the mask is changed in place later")


def view_of_memory_replaced_after(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    """What is written through the mask before it has other memory is seen by its view."""
    m = (keep > 0)[:, None, None]
    view = m.view(BATCH, LENGTH)
    m[..., 1:3] = False
    m.set_(keep > 2)
    return sdpa(q, k, v, view[:, None, None]), m


def test_views_of_a_tensor_with_other_memory() -> None:
    compare(view_of_memory_replaced_after, inputs())


@torch._dynamo.allow_in_graph  # type: ignore[untyped-decorator]
def unsqueezed_unseen(m: Tensor) -> Tensor:
    return m.unsqueeze_(1).clone()


def changed_by_something_unknown(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    m = (keep > 0)[:, None, None]
    output = sdpa(q, k, v, m)
    return output, unsqueezed_unseen(m), m


def test_what_something_unknown_changes_is_refused() -> None:
    assert_refused(changed_by_something_unknown, inputs(), reason="the mask is changed in place later")


def changed_in_a_region(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    m = (keep > 0)[:, None, None]
    output = sdpa(q, k, v, m)
    return output, checkpoint(lambda x: x + m.squeeze_(1).sum(), q, use_reentrant=False), m


def test_what_a_region_changes_is_refused() -> None:
    assert_refused(changed_in_a_region, inputs(), reason="the mask is changed in place later")


def product_changed_in_a_region(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Any:
    product = torch.einsum("bi,bj->bij", keep, keep)
    return checkpoint(lambda x: x + product.unsqueeze_(1).sum(), q, use_reentrant=False), sdpa(q, k, v)


def test_products_that_a_region_changes() -> None:
    assert compare(product_changed_in_a_region, inputs()).only().rewritten


def detached_after(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Any:
    y = sdpa(q @ WEIGHT, k, v)
    double = y * 2
    y.detach_()
    return double, y


def detached_after_something_was_written(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Any:
    """The query needs gradients as they were written to a part of it."""
    x = torch.zeros_like(q)
    x[0] = q[0] @ WEIGHT
    y = sdpa(x, k, v)
    double = y * 2
    y.detach_()
    return double, y


@pytest.mark.parametrize("function", [detached_after, detached_after_something_was_written])
def test_gradients_that_are_needed_until_later(function: Callable[..., Any]) -> None:
    for is_needed in (False, True):
        captured, results = _trained(function, is_needed)
        assert captured.only().rewritten is not is_needed
        assert [result.requires_grad for result in results] == [is_needed, False]


def written_after(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Any:
    y = sdpa(q, k, v)
    double = y * 2
    y.add_(WEIGHT[0])
    return double, y


def copied_after(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Any:
    x = torch.zeros_like(q)
    y = sdpa(x, k, v)
    x.copy_(q @ WEIGHT)
    return y, x


@pytest.mark.parametrize("function", [written_after, copied_after])
def test_gradients_that_are_needed_later(function: Callable[..., Any]) -> None:
    captured, results = _trained(function, True)
    assert captured.only().rewritten
    assert [result.requires_grad for result in results] == [False, True]


def _trained(function: Callable[..., Any], is_needed: bool) -> tuple[Capture, Any]:
    """What was captured of a function, and its results, which must be those of the function uncompiled."""
    torch._dynamo.reset()
    captured, args = Capture(), inputs()
    with torch.set_grad_enabled(is_needed):
        results = torch.compile(function, backend=captured)(*args)
        torch.testing.assert_close(results, function(*args))
    return captured, results


def test_graphs_with_nothing_rewritten_are_left_as_they_were() -> None:
    def function(x: Tensor) -> Any:
        y = x * 2
        z = y + 1
        y.unsqueeze_(0).transpose_(0, 1)
        return sdpa(z, z, z), y + 1, y

    plain: list[str] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        plain.append(str(module.graph))
        return module.forward

    x = torch.randn(2, 3, 4, requires_grad=True)
    torch.compile(function, backend=keep)(x)
    torch._dynamo.reset()
    captured = Capture()
    torch.compile(function, backend=captured)(x)
    assert not captured.only().rewritten
    assert [str(module.graph) for module in captured.modules] == plain
    assert not any("s2o_as_computed" in node.meta for node in captured.nodes())


def test_block_sparse_attention_of_bigbird() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BigBirdConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=256, attention_type="block_sparse", block_size=8, num_random_blocks=2,
    )  # fmt: skip
    model = transformers.BigBirdModel(config).eval()
    tokens = torch.randint(1, 97, (2, 128))
    compare(lambda x: model(x).last_hidden_state, [tokens])
    assert model.config.attention_type == "block_sparse"
