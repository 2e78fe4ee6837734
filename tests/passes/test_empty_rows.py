"""Queries that see no key get what the model gives them, or their attention stays as it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .capture import EXACT
from .compare import assert_refused, assert_rewritten, compare

BATCH, HEADS, LENGTH, CHANNELS = 4, 2, 23, 12
LEAST = torch.finfo(torch.float32).min

Attend = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inputs(length: int = LENGTH, keys: int | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, and a padding that hides all keys of one batch entry and the first or last of others."""
    keys = length if keys is None else keys
    padding = torch.ones(BATCH, keys, dtype=torch.bool)
    padding[0], padding[1, :9], padding[2, -4:] = False, False, False
    return [*(torch.randn(BATCH, HEADS, size, CHANNELS).to(dtype) for size in (length, keys, keys)), padding]


def i(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-2])[:, None]


def j(scores: Tensor) -> Tensor:
    return torch.arange(scores.shape[-1])


def causal(scores: Tensor) -> Tensor:
    return j(scores) <= i(scores) + (scores.shape[-1] - scores.shape[-2])


def scored(change: Callable[[Tensor, Tensor], Tensor]) -> Attend:
    return lambda q, k, v, padding: change(q @ k.mT * 0.3, padding[:, None, None]).softmax(-1) @ v


def hidden(seen: Callable[[Tensor, Tensor], Tensor], value: float = LEAST, how: str = "added") -> Attend:
    """Attention whose keys are hidden by a finite number."""
    changes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "added": lambda scores, padding: scores + torch.where(seen(scores, padding), 0.0, value).to(scores.dtype),
        "filled": lambda scores, padding: scores.masked_fill(~seen(scores, padding), value),
        "filled with -1e9": lambda scores, padding: scores.masked_fill(~seen(scores, padding), -1e9),
        "clamped": lambda scores, padding: torch.max(
            scores + torch.where(seen(scores, padding), 0.0, -math.inf), torch.tensor(value)
        ),
    }
    return scored(changes[how])


SEEN: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "padding": (lambda scores, padding: padding, "key padding"),
    "causal": (lambda scores, padding: causal(scores) & padding, "causal, offset 0; key padding"),
    "window": (
        lambda scores, padding: causal(scores) & (i(scores) - j(scores) < 4) & padding,
        "causal, offset 0; window 4; key padding",
    ),
    "window on both sides": (
        lambda scores, padding: ((i(scores) - j(scores)).abs() < 3) & padding,
        "causal, offset 2; window 5; key padding",
    ),
    "window on one side": (
        lambda scores, padding: (i(scores) - j(scores) < 4) & padding,
        "window 4, offset 0; key padding",
    ),
    "strictly causal": (lambda scores, padding: j(scores) < i(scores), "causal, offset -1"),
    "later keys": (lambda scores, padding: j(scores) > i(scores) + 2, "window 1, offset 3"),
    "documents": (
        lambda scores, padding: padding.long().cumsum(-1) == padding.long().cumsum(-1).mT + 3,
        "documents",
    ),
    "documents and padding": (
        lambda scores, padding: (padding.long().cumsum(-1) == padding.long().cumsum(-1).mT) & causal(scores) & padding,
        "causal, offset 0; key padding; documents",
    ),
    "mask": (lambda scores, padding: (j(scores) <= 2 * i(scores) - 3) & padding, "key padding; boolean mask"),
}


@pytest.mark.parametrize("how", ["added", "filled", "clamped"])
@pytest.mark.parametrize("name", SEEN)
def test_equal_weights(name: str, how: str) -> None:
    """Numbers that take the place of scores, or are too large to change by them, leave the mean of all values."""
    seen, mask = SEEN[name]
    if "documents" in name:
        # Which rows are empty is known from a mask over queries and keys, which a compiler need not store.
        assert compare(hidden(seen, how=how), inputs()).only().rewritten
    else:
        assert_rewritten(hidden(seen, how=how), inputs(), mask=mask)


@pytest.mark.parametrize("name", ["padding", "causal", "window on both sides", "later keys", "mask"])
def test_one_graph_for_all_lengths(name: str) -> None:
    seen, _ = SEEN[name]
    calls = [inputs(length) for length in (LENGTH, 11, 31)]
    assert_rewritten(hidden(seen, how="filled with -1e9"), *calls, mask=None, dynamic=True)


@pytest.mark.parametrize(("queries", "keys"), [(7, 23), (23, 29)])
def test_the_last_queries(queries: int, keys: int) -> None:
    """Rows before the first token of a left padded sequence, of a chunk that continues a cache."""
    assert_rewritten(hidden(SEEN["causal"][0], how="filled with -1e9"), inputs(queries, keys), mask=None)


@pytest.mark.parametrize("dynamic", [False, True])
def test_positions_of_queries_that_are_an_input(dynamic: bool) -> None:
    """As in a static cache, of which the queries are any part."""

    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, at: Tensor) -> Tensor:
        attention = hidden(lambda scores, padding: (j(scores) <= at[:, None]) & padding, how="filled with -1e9")
        return attention(q, k, v, padding)

    calls = [[*inputs(5, keys), torch.arange(6, 11)] for keys in ((23, 29) if dynamic else (23,))]
    captured = compare(attend, *calls, dynamic=dynamic)
    assert all(decision.rewritten for decision in captured.decisions)


def test_a_bias_of_zeros_beside_the_mask() -> None:
    attend = scored(lambda scores, padding: scores + (torch.zeros(scores.shape) + torch.where(padding, 0.0, LEAST)))
    assert compare(attend, inputs()).only().mask.startswith("key padding")


def test_grouped_heads() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        k, v = (x[:, :1].repeat_interleave(HEADS, 1) for x in (k, v))
        return hidden(SEEN["causal"][0])(q, k, v, padding)

    assert_rewritten(attend, inputs(), mask="causal, offset 0; key padding")


def test_a_mask_of_sdpa() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        mask = torch.where(causal(q @ k.mT) & padding[:, None, None], 0.0, torch.finfo(torch.float32).min)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert compare(attend, inputs()).only().rewritten


def test_booleans_of_sdpa_give_zeros() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=causal(q @ k.mT) & padding[:, None, None])

    compare(attend, inputs())
    assert not attend(*inputs())[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["added", "filled"])
@pytest.mark.parametrize("name", ["padding", "causal"])
def test_least_numbers_of_half_precision(name: str, how: str, dtype: torch.dtype) -> None:
    """-65504 of float16 keeps something of the scores, and below it there is only -inf."""
    attend, args = hidden(SEEN[name][0], torch.finfo(dtype).min, how), inputs(dtype=dtype)
    if dtype == torch.float16 and how == "added":
        assert_refused(attend, args, reason="by a finite number")
    else:
        assert_rewritten(attend, args, mask=SEEN[name][1], atol=2e-2, rtol=2e-2)


def test_a_small_number_leaves_the_scores() -> None:
    """The weights of a batch entry of which all is hidden are those without a mask, to the rounding of -1e4."""
    assert_rewritten(hidden(SEEN["padding"][0], -1e4), inputs(), mask="key padding", atol=2e-3, rtol=2e-3)


def twice(first: float, second: float) -> Attend:
    """Keys that both masks hide are hidden by the sum."""
    return scored(
        lambda scores, padding: scores + (1 - padding.float()) * first + (1 - causal(scores).float()) * second
    )


REFUSED: dict[str, Attend] = {
    "-1e9": hidden(SEEN["padding"][0], -1e9),
    "-1e4 and causal": hidden(SEEN["causal"][0], -1e4),
    "added twice": twice(-1e9, -1e9),
    "least numbers added twice": twice(LEAST, LEAST),
    "filled with two numbers": scored(
        lambda scores, padding: scores.masked_fill(~padding, -1e9).masked_fill(~causal(scores), -1e8)
    ),
    "filled with a number and -inf": scored(
        lambda scores, padding: scores.masked_fill(~padding, -1e9).masked_fill(~causal(scores), -math.inf)
    ),
    "filled and added": scored(
        lambda scores, padding: scores.masked_fill(~causal(scores), LEAST) + torch.where(padding, 0.0, LEAST)
    ),
    "padding of queries": scored(lambda scores, padding: scores.masked_fill(~padding.mT, -1e9)),
    "NaN replaced": lambda q, k, v, padding: (
        (q @ k.mT).masked_fill(~padding[:, None, None], -1e9).softmax(-1).nan_to_num() @ v
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_weights_are_refused(name: str) -> None:
    assert_refused(REFUSED[name], inputs(), reason="finite")


NEVER_EMPTY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda scores, padding: causal(scores),
    "window": lambda scores, padding: causal(scores) & (i(scores) - j(scores) < 4),
    "documents": lambda scores, padding: causal(scores) & ((ids := padding.long().cumsum(-1)) == ids.mT),
    "documents, swapped": lambda scores, padding: (
        causal(scores) & ((ids := padding.long().cumsum(-1)) == torch.swapaxes(ids, -1, -2))
    ),
    "documents, moved": lambda scores, padding: (
        causal(scores) & ((ids := padding.long().cumsum(-1)) == ids.movedim(-1, -2))
    ),
    "documents, by the operator": lambda scores, padding: (
        causal(scores) & ((ids := padding.long().cumsum(-1)) == torch.ops.aten.mT(ids))
    ),
    "or the first": lambda scores, padding: (causal(scores) & padding) | (j(scores) == 0),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", NEVER_EMPTY)
def test_rows_that_are_never_empty_cost_nothing(name: str, dynamic: bool) -> None:
    calls = [inputs(length) for length in ((LENGTH, 11, 31) if dynamic else (LENGTH,))]
    captured = assert_rewritten(hidden(NEVER_EMPTY[name], how="filled with -1e9"), *calls, mask=None, dynamic=dynamic)
    assert not any("where" in node.name or node.target == "mean" for node in captured.nodes())


def test_through_inductor() -> None:
    attend = hidden(SEEN["causal"][0], -1e9, "filled")
    compiled = torch.compile(attend, backend="s2o", options=EXACT.to_dict(), fullgraph=True)
    with torch.no_grad():
        for length in (LENGTH, 31, 17):
            args = inputs(length)
            torch.testing.assert_close(compiled(*args), attend(*args))
