"""What looks like attention and is not quite: it keeps its results, and the decision says why it stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from .capture import Capture
from .compare import assert_refused, assert_rewritten, compare

BATCH, HEADS, QUERIES, KEYS, CHANNELS = 3, 2, 13, 23, 12

Attend = Callable[..., Any]


def inputs(keys: int = KEYS, queries: int = QUERIES, heads: int = HEADS) -> list[Tensor]:
    return [torch.randn(BATCH, heads, length, CHANNELS) for length in (queries, keys, keys)]


def dot(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.3


def scored(change: Callable[[Tensor], Tensor]) -> Attend:
    """Attention with changed scores."""
    return lambda q, k, v: change(dot(q, k)).softmax(-1) @ v


def weighted(change: Callable[[Tensor], Tensor]) -> Attend:
    """Attention with another function from scores to weights than a softmax over keys."""
    return lambda q, k, v: change(dot(q, k)) @ v


def i() -> Tensor:
    return torch.arange(QUERIES)[:, None]


def j() -> Tensor:
    return torch.arange(KEYS)


def filled(hidden: Callable[[], Tensor], value: float = -math.inf) -> Attend:
    return scored(lambda scores: scores.masked_fill(hidden(), value))


def two_temperatures(scores: Tensor) -> Tensor:
    return scores / (1 + i())


def alibi(scores: Tensor) -> Tensor:
    return scores + torch.tensor([0.5, 0.25])[:, None, None] * (j() - i())


def with_table(scores: Tensor) -> Tensor:
    return scores + PER_DISTANCE[:, (j() - i()) % 5]


def bias_summed_in_place(scores: Tensor) -> Tensor:
    bias = 0 + PER_PAIR
    bias += PER_QUERY
    return scores + bias


def filled_by_index(scores: Tensor) -> Tensor:
    scores[..., j() > i()] = -math.inf
    return scores


def one_row_changed(scores: Tensor) -> Tensor:
    scores[:, :, 3] = 0
    return scores


def one_view_scaled(scores: Tensor) -> Tensor:
    scores[:, 0].mul_(2)
    return scores


def softmax_plus_one(scores: Tensor) -> Tensor:
    """The softmax with an extra key of logit 0 and value 0."""
    exponentials = scores.exp()
    return exponentials / (1 + exponentials.sum(-1, keepdim=True))


def sink(scores: Tensor) -> Tensor:
    return torch.cat([scores, torch.zeros(BATCH, HEADS, QUERIES, 1)], -1).softmax(-1)[..., :-1]


def other_sum(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / exponentials.sum(-2, keepdim=True)


def other_maximum(scores: Tensor) -> Tensor:
    exponentials = (scores - (scores * 2).amax(-1, keepdim=True)).exp()
    return exponentials / exponentials.sum(-1, keepdim=True)


def sum_of_squares(scores: Tensor) -> Tensor:
    exponentials = scores.exp()
    return exponentials / (exponentials * exponentials).sum(-1, keepdim=True)


def renormalised(scores: Tensor) -> Tensor:
    probabilities = scores.softmax(-1) * (j() <= i())
    return probabilities / probabilities.sum(-1, keepdim=True)


def changed_probabilities(scores: Tensor) -> Tensor:
    probabilities = scores.softmax(-1)
    probabilities[..., 0] = 0
    return probabilities


PER_HEAD, PER_QUERY, PER_PAIR = torch.rand(HEADS, 1, 1), torch.rand(QUERIES, 1), torch.randn(HEADS, QUERIES, KEYS)
PER_DISTANCE, TEMPERATURE = torch.randn(HEADS, 5), torch.rand(())
MASK_PER_HEAD = torch.tensor([0, 4])[:, None, None]

REFUSED: dict[str, tuple[Attend, str]] = {
    "softmax over queries": (lambda q, k, v: dot(q, k).softmax(-2) @ v, "another dimension than keys"),
    "softmax over heads": (lambda q, k, v: dot(q, k).softmax(1) @ v, "another dimension than keys"),
    "scale per head": (scored(lambda scores: scores * PER_HEAD), "tensor with content"),
    "scale per query": (scored(lambda scores: scores * PER_QUERY), "tensor with content"),
    "scale that is an input": (scored(lambda scores: scores * TEMPERATURE), "tensor with content"),
    "temperature per position": (scored(two_temperatures), "tensor with content"),
    "masked by a product": (scored(lambda scores: scores * (j() <= i()) - 1e9 * (j() > i())), "tensor with content"),
    "scale of zero": (scored(lambda scores: scores * 0), "scaled by 0"),
    "alibi": (scored(alibi), "additive bias with content"),
    "table of distances": (scored(with_table), "additive bias with content"),
    "bias": (scored(lambda scores: scores + PER_PAIR), "additive bias with content"),
    "bias summed in place": (scored(bias_summed_in_place), "additive bias with content"),
    "zero times infinity": (
        scored(lambda scores: scores + torch.ones(QUERIES, KEYS).triu(1) * -math.inf),
        "additive bias with content",
    ),
    "another maximum": (weighted(other_maximum), "additive bias with content"),
    "bias from the mask": (scored(lambda scores: scores - (j() > i()).float()), "additive bias with content"),
    "filled by index": (scored(filled_by_index), "changed in place"),
    "one row changed": (scored(one_row_changed), "changed in place"),
    "one view scaled": (scored(one_view_scaled), "changed in place"),
    "query padding": (filled(lambda: PER_QUERY > 0.5, -1e9), "by a finite number"),
    "filled with -1": (filled(lambda: j() > i(), -1.0), "masked scores become -1"),
    "filled with 0": (filled(lambda: j() > i(), 0.0), "masked scores become 0"),
    "filled with -1e3": (filled(lambda: j() > i(), -1e3), "masked scores become -1000"),
    "filled with inf": (filled(lambda: j() > i() + 30, math.inf), "masked scores become inf"),
    "filled, then scaled": (
        scored(lambda scores: scores.masked_fill(j() > i(), -1e4) * 1e-4),
        "masked scores become -1",
    ),
    "filled, then negated": (
        scored(lambda scores: scores.masked_fill(j() > i(), -1e9) * -1.0),
        "masked scores become a value that is not known",
    ),
    "filled, then filled again": (
        scored(lambda scores: scores.masked_fill(j() > i(), -1e9).masked_fill(j() > i() + 1, 0.0)),
        "masked scores become 0",
    ),
    "half of the mask added": (scored(lambda scores: scores + (j() > i()) * -3.0), "additive bias with content"),
    "probabilities returned": (
        lambda q, k, v: ((p := dot(q, k).softmax(-1)) @ v, p),
        "used elsewhere",
    ),
    "probabilities used": (lambda q, k, v: ((p := dot(q, k).softmax(-1)) @ v, p.sum(2)), "used elsewhere"),
    "scores returned": (lambda q, k, v: ((s := dot(q, k)).softmax(-1) @ v, s), "used elsewhere"),
    "scores changed afterwards": (
        lambda q, k, v: ((s := dot(q, k)).softmax(-1) @ v, s.zero_()),
        "used elsewhere",
    ),
    "scores used before their mask": (
        lambda q, k, v: ((s := q @ k.mT).masked_fill(j() > i(), -math.inf).softmax(-1) @ v, s.mean()),
        "used elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    function, reason = REFUSED[name]
    assert_refused(function, inputs(), reason=reason)


NOT_ATTENTION: dict[str, Attend] = {
    "two softmaxes": weighted(lambda scores: scores.softmax(-1).softmax(-1)),
    "no softmax": weighted(lambda scores: scores),
    "sigmoid": weighted(torch.sigmoid),
    "softmax with one more": weighted(softmax_plus_one),
    "softmax with a sink": weighted(sink),
    "sum over queries": weighted(other_sum),
    "sum of squares": weighted(sum_of_squares),
    "masked probabilities": weighted(lambda scores: scores.softmax(-1) * (j() <= i())),
    "renormalised": weighted(renormalised),
    "probabilities scaled": weighted(lambda scores: scores.softmax(-1) * 2),
    "probabilities rounded": weighted(lambda scores: scores.softmax(-1).round(decimals=1)),
    "softmin": weighted(lambda scores: torch.nn.functional.softmin(scores, -1)),
    "gumbel softmax": weighted(lambda scores: torch.nn.functional.gumbel_softmax(scores, dim=-1)),
    "clamped": scored(lambda scores: scores.clamp(-1, 1)),
    "squared": scored(lambda scores: scores * scores),
    "absolute": scored(torch.abs),
    "divided by": scored(lambda scores: 1 / scores),
    "subtracted from": scored(lambda scores: scores - scores.mT.mT * 2),
    "cumulative": scored(lambda scores: scores.cumsum(-1)),
    "flipped": scored(lambda scores: scores.flip(-1)),
    "rolled": scored(lambda scores: scores.roll(1, -1)),
    "integers": scored(lambda scores: scores.int().float()),
    "distances": lambda q, k, v: (-torch.cdist(q, k)).softmax(-1) @ v,
    "value scaled": lambda q, k, v: torch.baddbmm(
        v[0, :, :QUERIES], dot(q, k).softmax(-1)[0], v[0], beta=0.5, alpha=0.5
    ),
    "einsum over channels as well": lambda q, k, v: torch.einsum("bhqk,bhkd->bhq", dot(q, k).softmax(-1), v),
    "einsum over heads": lambda q, k, v: torch.einsum("bhqd,bgkd->bqk", q, k).softmax(-1) @ v[:, 0],
    "probabilities changed": weighted(changed_probabilities),
}


@pytest.mark.parametrize("name", NOT_ATTENTION)
def test_not_rewritten(name: str) -> None:
    assert compare(NOT_ATTENTION[name], inputs()).operators() == []


EXACT: dict[str, tuple[Attend, str]] = {
    "one more than causal": (filled(lambda: j() > i() + 1), "causal, offset 1"),
    "not more than causal": (filled(lambda: j() >= i() + 1), "causal, offset 0"),
    "two masks": (
        scored(lambda scores: scores.masked_fill(j() > i() + 2, -1e9).masked_fill(j() > i() + 1, -math.inf)),
        "causal, offset 1",
    ),
    "transposed causal": (filled(lambda: j() < i()), "window 1, offset 0"),
    "diagonal": (filled(lambda: (j() != i()) & (j() > 0)), "boolean mask"),
    "causal with a window": (filled(lambda: (j() > i()) | (j() <= i() - 4)), "causal, offset 0; window 4"),
    "another mask per head": (filled(lambda: j() > i() + MASK_PER_HEAD), "boolean mask"),
    "another mask per query": (filled(lambda: PER_PAIR[0] > 0), "boolean mask"),
    "soft cap": (scored(lambda scores: torch.tanh(scores / 2) * 2), "everything; soft cap 2"),
    "a mask that hides nothing": (filled(lambda: j() > i() + KEYS), "everything"),
    "negative scale": (scored(lambda scores: scores * -1.5), "everything"),
    "probabilities used by their shape": (lambda q, k, v: dot(q, k).softmax(-1) @ v * k.shape[2], "everything"),
    "key is value": (lambda q, k, v: dot(q, k).softmax(-1) @ k, "everything"),
    "all the same": (lambda q, k, v: dot(k, k).softmax(-1) @ k, "everything"),
    "query and key exchanged": (lambda q, k, v: dot(k, q).softmax(-2).mT @ v, "everything"),
}


@pytest.mark.parametrize("name", EXACT)
def test_rewritten_exactly(name: str) -> None:
    function, mask = EXACT[name]
    assert_rewritten(function, inputs(), mask=mask)


def test_strictly_causal() -> None:
    """Row 0 sees no key: zeros from the operator, and nothing with a meaning from a softmax."""
    function = filled(lambda: j() >= i())
    assert_rewritten(lambda q, k, v: function(q, k, v)[:, :, 1:], inputs(), mask="causal, offset -1")


def with_key_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = dot(q, k).softmax(-1)
    k.add_(1)
    return probabilities @ v


def with_query_changed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = dot(q, k)
    q[:, :, 0].zero_()
    return scores.softmax(-1) @ v


def with_value_changed_by_its_base(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    swapped = v.transpose(0, 1)
    probabilities = dot(q, k).softmax(-1)
    v *= 2
    return probabilities @ swapped.transpose(0, 1)


def with_query_changed_after_its_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = q * 0.5
    q.zero_()
    return (scaled @ k.mT).softmax(-1) @ v


def with_key_changed_before_its_copy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k.mul_(2)
    copy = k.contiguous() * 0.5
    return dot(q, copy).softmax(-1) @ v


def with_a_clone_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    copy = k.clone()
    scores = dot(q, copy)
    k.zero_()
    return scores.softmax(-1) @ v


def with_mask_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = j() > i()
    hidden[:, 3] = True
    return dot(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


def with_mask_changed_afterwards(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = j() > i()
    scores = dot(q, k).masked_fill(hidden, -math.inf)
    hidden.zero_()
    return scores.softmax(-1) @ v + hidden.sum()


def with_probabilities_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = dot(q, k).softmax(-1)
    probabilities.mul_(j() <= i())
    return probabilities @ v


def with_key_changed_in_a_list(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = dot(q, k).softmax(-1)
    torch._foreach_mul_([k], 2.0)
    return probabilities @ v


def with_key_changed_as_an_array(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = dot(q, k).softmax(-1)
    k.numpy().fill(2)
    return probabilities @ v


def with_key_changed_as_a_running_mean(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probabilities = dot(q, k).softmax(-1)
    torch.nn.functional.batch_norm(q.flatten(0, 2), k[0, 0, 0], torch.ones(CHANNELS), training=True)
    return probabilities @ v


def with_scale_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scale = torch.tensor(2.0)
    scale.mul_(3)
    return (dot(q, k) * scale).softmax(-1) @ v


def with_soft_cap_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cap = torch.tensor(2.0)
    cap.mul_(3)
    return (torch.tanh(dot(q, k) / cap) * cap).softmax(-1) @ v


def with_filling_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    value = torch.full((), -math.inf)
    value.zero_()
    return dot(q, k).masked_fill(j() > i(), value).softmax(-1) @ v


def with_sum_of_masks_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((QUERIES, KEYS), -math.inf).triu(1) + torch.full((QUERIES, KEYS), -math.inf).triu(2)
    mask[:, 3] = -math.inf
    return (dot(q, k) + mask).softmax(-1) @ v


def with_output_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    output = dot(q, k).softmax(-1) @ v
    output[:, :, 0] = 1
    return output.mul_(2)


CHANGED = [
    with_key_changed,
    with_query_changed_through_a_view,
    with_value_changed_by_its_base,
    with_key_changed_in_a_list,
    with_key_changed_as_an_array,
    with_key_changed_as_a_running_mean,
    with_scale_changed,
    with_filling_changed,
    with_sum_of_masks_changed,
    with_soft_cap_changed,
    with_probabilities_changed,
]
CHANGED_WITHOUT_HARM = [
    with_query_changed_after_its_scale,
    with_key_changed_before_its_copy,
    with_a_clone_changed,
    with_output_changed,
]


def and_inputs(function: Attend) -> Attend:
    """A function that also returns what it left in its inputs."""
    return lambda q, k, v: (function(q, k, v), q, k, v)


@pytest.mark.parametrize("function", CHANGED)
def test_changed_in_place(function: Attend) -> None:
    captured = compare(and_inputs(function), inputs())
    assert captured.operators() == []
    assert all("in place" in decision.reason for decision in captured.decisions)


@pytest.mark.parametrize("function", CHANGED_WITHOUT_HARM)
def test_changed_in_place_without_harm(function: Attend) -> None:
    assert_rewritten(and_inputs(function), inputs())


def test_a_mask_that_is_changed_afterwards() -> None:
    assert compare(and_inputs(with_mask_changed_afterwards), inputs()).only().mask == "causal, offset 0"


def test_a_mask_that_was_changed_in_place() -> None:
    assert_rewritten(and_inputs(with_mask_changed), inputs(), mask="boolean mask")


ALIKE: dict[str, Attend] = {
    "value transposed": lambda q, k, v: dot(q, k).softmax(-1) @ v.mT,
    "key not transposed": lambda q, k, v: (q @ k).softmax(-1) @ v,
    "scores transposed": lambda q, k, v: dot(q, k).mT.softmax(-1) @ v,
    "batch and heads exchanged": lambda q, k, v: dot(q, k).transpose(0, 1).softmax(-1) @ v,
    "batch and heads of the value exchanged": lambda q, k, v: dot(q, k).softmax(-1) @ v.transpose(0, 1),
    "queries and heads of the query exchanged": lambda q, k, v: dot(q.transpose(1, 2), k).softmax(-1) @ v,
    "output exchanged": lambda q, k, v: (dot(q, k).softmax(-1) @ v).transpose(0, 2),
    "einsum, value transposed": lambda q, k, v: torch.einsum("bhqk,bhdk->bhqd", dot(q, k).softmax(-1), v),
    "einsum, key transposed": lambda q, k, v: torch.einsum("bhqd,bhdk->bhqk", q, k).softmax(-1) @ v,
    "einsum, heads exchanged": lambda q, k, v: torch.einsum("bhqd,hbkd->bhqk", q, k).softmax(-1) @ v,
    "einsum, output transposed": lambda q, k, v: torch.einsum("bhqk,bhkd->dqbh", dot(q, k).softmax(-1), v),
    "reshaped": lambda q, k, v: dot(q.reshape(5, 25, 5).view(5, 5, 5, 5), k).softmax(-1) @ v,
    "mask transposed": lambda q, k, v: (dot(q, k) + torch.full((5, 5), -math.inf).triu(1).T).softmax(-1) @ v,
    "mask before a transpose": lambda q, k, v: (dot(q, k) + torch.full((5, 5), -math.inf).triu(1)).mT.softmax(-1) @ v,
    "mask over heads": lambda q, k, v: (dot(q, k) + torch.full((5, 5), -math.inf).triu(1)[:, None]).softmax(-1) @ v,
    "mask": lambda q, k, v: (dot(q, k) + torch.full((5, 5), -math.inf).triu(1)).softmax(-1) @ v,
}
ALIKE_REFUSED: dict[str, tuple[Attend, str]] = {
    "probabilities transposed": (lambda q, k, v: dot(q, k).softmax(-1).mT @ v, "another dimension than keys"),
    "softmax over queries": (lambda q, k, v: dot(q, k).softmax(-2) @ v, "another dimension than keys"),
}


def alike() -> list[Tensor]:
    """Query, key and value of which all sizes are equal, so that only their order says what is what."""
    return [torch.randn(5, 5, 5, 5) for _ in range(3)]


@pytest.mark.parametrize("name", ALIKE)
def test_equal_sizes_are_told_apart(name: str) -> None:
    captured = compare(ALIKE[name], alike(), dynamic=True)
    assert captured.only().rewritten, captured.only().reason


@pytest.mark.parametrize("name", ALIKE_REFUSED)
def test_equal_sizes_are_told_apart_where_refused(name: str) -> None:
    function, reason = ALIKE_REFUSED[name]
    assert_refused(function, alike(), reason=reason)


def test_a_mask_per_head_of_one_sequence() -> None:
    """Heads of a batch of one are as good as a batch."""
    visible = torch.rand(HEADS, KEYS) < 0.7
    visible[:, 0] = True
    args = [x[:1] for x in inputs()]
    assert_rewritten(filled(lambda: ~visible[:, None]), args, mask="key padding")


@pytest.mark.parametrize("shared", [0, 1], ids=["query", "key and value"])
def test_broadcast_batches(shared: int) -> None:
    """One query for a batch of keys, or one sequence of keys for a batch of queries."""
    q, k, v = inputs()
    args = [q[:1], k, v] if shared == 0 else [q, k[:1], v[:1]]
    captured = compare(lambda q, k, v: dot(q, k).softmax(-1) @ v, args)
    assert captured.only().rewritten or "batch" in captured.only().reason


def test_float64_is_refused() -> None:
    assert_refused(scored(lambda scores: scores), [x.double() for x in inputs()], reason="float64")


def test_gradients_are_refused() -> None:
    captured, attend = Capture(), scored(lambda scores: scores)
    args = [x.requires_grad_() for x in inputs()]
    expected = [x.detach().clone().requires_grad_() for x in args]
    torch.compile(attend, backend=captured)(*args).sum().backward()
    attend(*expected).sum().backward()
    assert "torch.no_grad()" in captured.only().reason
    torch.testing.assert_close([x.grad for x in args], [x.grad for x in expected])


def test_two_attentions_of_one_graph_are_decided_apart() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = filled(lambda: j() > i())(q, k, v)
        return filled(lambda: j() > i(), -1.0)(first, k, v)

    captured = compare(attend, inputs())
    assert [decision.rewritten for decision in captured.decisions] == [True, False]
