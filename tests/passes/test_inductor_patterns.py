"""The 30 attention patterns that Inductor of torch 2.13 knows, as inference spells them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import dropout, softmax

from s2o_compile import S2OConfig

from .capture import EXACT
from .compare import assert_refused, assert_rewritten

HEADS, CHANNELS = 2, 12
SIZES = [(3, 13, 23), (1, 23, 13)]
"""Batch, queries and keys."""

Pattern = Callable[..., Any]

UNPROVEN = {"added": "additive bias with content"}
"""Why a mask that is an input of the graph is refused, by the pattern's parameter."""


def heads_first(attend: Pattern) -> Pattern:
    """A pattern over [batch, heads, length, channels] as one over [batch, length, heads, channels]."""

    @functools.wraps(attend)
    def permuted(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Any:
        return attend(*(x.permute(0, 2, 1, 3) for x in (q, k, v)), **others)

    return permuted


def with_cache(attend: Pattern) -> Pattern:
    """A pattern that returns key and value as well."""

    @functools.wraps(attend)
    def cached(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Any:
        return attend(q, k, v, **others), k, v

    return cached


def dot(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-2, -1))


def divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dot(q, k).div(3.0).softmax(dim=-1).matmul(v)


def divided_dropout(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return dropout(dot(q, k).div(3.0).softmax(dim=-1), p=p).matmul(v)


def multiplied(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dot(q, k).mul(0.3).softmax(dim=-1).matmul(v)


def multiplied_dropout(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return dropout(dot(q, k).mul(0.3).softmax(dim=-1), p=p).matmul(v)


def biased(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return torch.softmax(dot(q, k) / 3.0 + added, dim=-1) @ v


def biased_dropout(q: Tensor, k: Tensor, v: Tensor, added: Tensor, p: float) -> Tensor:
    return torch.dropout(torch.softmax(dot(q, k) / 3.0 + added, dim=-1), p, True) @ v


def biased_dropout_cast(q: Tensor, k: Tensor, v: Tensor, added: Tensor, p: float) -> Tensor:
    return dropout((dot(q, k).div(3.0) + added).softmax(dim=-1), p).to(dtype=q.dtype).matmul(v)


def to_half(probabilities: Tensor, v: Tensor) -> Tensor:
    probabilities = probabilities.to(torch.float16)
    return probabilities @ v.to(probabilities.dtype)


def half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return to_half(torch.softmax((dot(q, k) / 3.0).to(torch.float32), dim=-1), v)


def half_dropout(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return to_half(torch.dropout(torch.softmax((dot(q, k) / 3.0).to(torch.float32), dim=-1), p, True), v)


def half_folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return to_half(torch.softmax(dot(q / 3.0, k).to(torch.float32), dim=-1), v)


def half_folded_dropout(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return to_half(torch.dropout(torch.softmax(dot(q / 3.0, k).to(torch.float32), dim=-1), p, True), v)


def joined(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(dropout(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), p=p), v)


def padded(scores: Tensor, padding: Tensor) -> Tensor:
    hidden = (padding == 0).view((scores.size(0), 1, 1, scores.size(-1))).expand_as(scores)
    return torch.softmax(scores.masked_fill(hidden, torch.full((), -float("inf"), dtype=scores.dtype)), dim=-1)


def distilbert(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
    return padded(dot(q, k).div(3.0), padding) @ v


def distilbert_dropout(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, p: float) -> Tensor:
    return dropout(padded(dot(q, k).div(3.0), padding), p) @ v


def distilbert_folded_dropout(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, p: float) -> Tensor:
    return dropout(padded(dot(q.div(3.0), k), padding), p) @ v


def gpt2_scores(q: Tensor, k: Tensor, keep: Tensor) -> Tensor:
    scores = torch.matmul(q, k.permute(0, 1, 3, 2))
    scores = scores.div(torch.full([], 3.0, dtype=scores.dtype))
    return torch.where(keep, scores, torch.full((), torch.finfo(q.dtype).min, dtype=q.dtype))


def gpt2(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, p: float) -> Tensor:
    return dropout(gpt2_scores(q, k, keep).softmax(dim=-1), p).matmul(v)


def gpt2_biased(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, added: Tensor, p: float) -> Tensor:
    return dropout((gpt2_scores(q, k, keep) + added).softmax(dim=-1).type(v.dtype), p).matmul(v)


def t5_rounded(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    return (dot(q, k) + added).type_as(q).float().softmax(dim=-1).type_as(q).matmul(v)


def t5_unbiased_rounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return dot(q, k).float().type_as(q).float().softmax(dim=-1).type_as(q).matmul(v)


def t5(q: Tensor, k: Tensor, v: Tensor, added: Tensor, p: float) -> Tensor:
    return dropout((dot(q, k) + added).float().softmax(dim=-1).type_as(q), p).matmul(v)


def t5_unbiased(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return dropout(dot(q, k).float().softmax(dim=-1).type_as(q), p).matmul(v)


def mbart(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    batch, heads, queries, channels = q.shape
    q, k, v = (x.reshape(batch * heads, -1, channels) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, heads, queries, -1) + added.float()
    probabilities = softmax(scores.view(batch * heads, queries, -1), dim=-1).to(q.dtype)
    return torch.bmm(probabilities, v).view(batch, heads, queries, channels)


def bert(q: Tensor, k: Tensor, v: Tensor, added: Tensor) -> Tensor:
    scaled = torch.ops.aten.mul.Scalar(q, 0.6), torch.ops.aten.mul.Scalar(k.transpose(-2, -1), 0.6)
    return torch.ops.aten._safe_softmax(torch.matmul(*scaled) + added, -1) @ v


def bert_unbiased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = torch.ops.aten.mul.Scalar(q, 0.6), torch.ops.aten.mul.Scalar(k.transpose(-2, -1), 0.6)
    return torch.ops.aten._safe_softmax(torch.matmul(*scaled), -1) @ v


PATTERNS: dict[int, Pattern] = {
    1: divided,
    2: multiplied,
    3: divided_dropout,
    4: multiplied_dropout,
    5: biased,
    6: biased_dropout,
    7: heads_first(half_dropout),
    8: heads_first(half),
    9: heads_first(half_folded_dropout),
    10: heads_first(half_folded),
    11: heads_first(divided),
    12: heads_first(divided_dropout),
    13: joined,
    14: heads_first(biased),
    15: heads_first(distilbert),
    16: heads_first(biased_dropout_cast),
    17: heads_first(distilbert_dropout),
    18: heads_first(with_cache(gpt2)),
    19: gpt2_biased,
    20: heads_first(distilbert_folded_dropout),
    21: heads_first(t5_rounded),
    22: heads_first(with_cache(t5_rounded)),
    23: heads_first(with_cache(t5_unbiased_rounded)),
    24: mbart,
    25: heads_first(t5),
    26: heads_first(with_cache(t5)),
    27: heads_first(with_cache(t5_unbiased)),
    28: heads_first(multiplied_dropout),
    29: heads_first(bert),
    30: heads_first(bert_unbiased),
}
LENGTH_FIRST = {number for number, pattern in PATTERNS.items() if hasattr(pattern, "__wrapped__")}
"""Those that take [batch, length, heads, channels]."""

ONLY_HALF = {7, 8, 9, 10}
ALSO_HALF = {16, 19, *range(21, 28), 29, 30}
CASES = [(number, torch.float32, size) for number in PATTERNS if number not in ONLY_HALF for size in SIZES]
CASES += [(number, torch.float16, SIZES[number % 2]) for number in sorted(ONLY_HALF | ALSO_HALF)]

MASKS: dict[str, Callable[[int, int, int], Tensor]] = {
    "keep": lambda batch, queries, keys: torch.ones(queries, keys, dtype=torch.bool).tril(),
    "added": lambda batch, queries, keys: torch.full((queries, keys), float("-inf")).triu(1),
    "padding": lambda batch, queries, keys: (torch.arange(keys) > torch.arange(batch)[:, None]).long(),
}
"""The masks that patterns take, by the name of their parameter."""


def parameters(number: int) -> list[str]:
    """What a pattern takes besides query, key and value."""
    return list(inspect.signature(PATTERNS[number]).parameters)[3:]


def masks(number: int) -> list[str]:
    return [name for name in parameters(number) if name in MASKS]


def inputs(number: int, dtype: torch.dtype, batch: int, queries: int, keys: int) -> list[Tensor]:
    """Query, key and value, and the padding if the pattern takes one."""
    tensors = [torch.randn(batch, HEADS, length, CHANNELS, dtype=dtype) for length in (queries, keys, keys)]
    if number in LENGTH_FIRST:
        tensors = [x.transpose(1, 2).contiguous() for x in tensors]
    return tensors + [MASKS["padding"](batch, queries, keys)] * ("padding" in masks(number))


def called(number: int, size: tuple[int, int, int], p: float = 0.0) -> Pattern:
    """A pattern with its mask built in the graph, as a function of what `inputs` returns."""

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Any:
        given = {"padding": padding, "p": p}
        built = {name: MASKS[name](*size) for name in masks(number) if name != "padding"}
        if "added" in built:
            built["added"] = built["added"].to(q.dtype)
        return PATTERNS[number](q, k, v, **{name: (given | built)[name] for name in parameters(number)})

    return attend


def tolerances(dtype: torch.dtype) -> dict[str, float]:
    return {"atol": 5e-3, "rtol": 5e-3} if dtype == torch.float16 else {"atol": 1e-5, "rtol": 1e-5}


def proven(number: int) -> str:
    """What the masks say that `called` builds or `inputs` returns."""
    if "padding" in masks(number):
        return "key padding"
    return "causal, offset 0" if masks(number) else "everything"


@pytest.mark.parametrize(("number", "dtype", "size"), CASES, ids=str)
def test_rewritten(number: int, dtype: torch.dtype, size: tuple[int, int, int]) -> None:
    attend = called(number, size)
    assert_rewritten(attend, inputs(number, dtype, *size), mask=proven(number), **tolerances(dtype))


@pytest.mark.parametrize("number", [number for number in PATTERNS if {"keep", "added"} & set(masks(number))])
def test_masks_that_are_inputs(number: int) -> None:
    size, dtype = SIZES[0], torch.float32
    given = {name: MASKS[name](*size) for name in masks(number)}
    reasons = [UNPROVEN[name] for name in given if name in UNPROVEN]

    def attend(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Any:
        others = dict(zip(given, tensors, strict=True)) | {"p": 0.0}
        return PATTERNS[number](q, k, v, **{name: others[name] for name in parameters(number)})

    args = [*inputs(number, dtype, *size), *given.values()]
    if reasons:
        assert_refused(attend, args, reason=reasons[0])
    else:
        assert_rewritten(attend, args, mask="boolean mask")


@pytest.mark.parametrize("number", [number for number in PATTERNS if "p" in parameters(number)])
def test_active_dropout_is_refused(number: int) -> None:
    dtype = torch.float16 if number in ONLY_HALF else torch.float32
    attend = called(number, SIZES[0], p=0.5)
    assert_refused(attend, inputs(number, dtype, *SIZES[0]), reason="dropout is active", **tolerances(dtype))


@pytest.mark.parametrize("number", [16, 24])
def test_through_inductor(number: int) -> None:
    attend, args = called(number, SIZES[0]), inputs(number, torch.float32, *SIZES[0])
    options = {name: getattr(EXACT, name) for name in S2OConfig.__dataclass_fields__}
    with torch.no_grad():
        compiled = torch.compile(attend, backend="s2o", options=options, fullgraph=True)
        torch.testing.assert_close(compiled(*args), attend(*args))
