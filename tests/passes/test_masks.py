"""The prover: what it proves is what the mask says, and near-misses are told apart."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from .capture import Capture, capture, inputs
from .compare import compare

L = 12
Build = Callable[[torch.Tensor], torch.Tensor]


def i() -> torch.Tensor:
    return torch.arange(L)[:, None]


def j() -> torch.Tensor:
    return torch.arange(L)[None, :]


def prove(build: Build, pad: torch.Tensor | None = None, dynamic: bool = False) -> Capture:
    """Compile attention under a mask and check that it computes what it computes uncompiled."""
    pad = torch.ones(2, L, dtype=torch.bool) if pad is None else pad
    args = inputs(queries=L)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=build(pad))

    captured, output = capture(attend, *args, pad, dynamic=dynamic)
    torch.testing.assert_close(output, attend(*args, pad))
    return captured


def assert_no_mask_left(captured: Capture) -> None:
    """No tensor of the graph has both queries and keys for dimensions."""
    for node in captured.nodes():
        tensor = node.meta.get("example_value")
        if isinstance(tensor, torch.Tensor):
            assert tuple(tensor.shape).count(L) + tuple(tensor.shape).count(2 * L) < 2, node


def random_padding() -> torch.Tensor:
    pad = torch.rand(2, L) < 0.7
    pad[:, 0] = True
    return pad


PAD = "key padding from input pad"
PROVEN: dict[str, tuple[Build, str]] = {
    "ones": (lambda pad: torch.ones(L, L, dtype=torch.bool), "everything"),
    "full": (lambda pad: torch.full((L, L), True), "everything"),
    "always true": (lambda pad: i() >= 0, "everything"),
    "le": (lambda pad: j() <= i(), "causal, offset 0"),
    "lt": (lambda pad: j() < i() + 1, "causal, offset 0"),
    "ge": (lambda pad: i() >= j(), "causal, offset 0"),
    "gt": (lambda pad: i() + 1 > j(), "causal, offset 0"),
    "not gt": (lambda pad: ~(j() > i()), "causal, offset 0"),
    "difference": (lambda pad: i() - j() >= 0, "causal, offset 0"),
    "offset": (lambda pad: j() <= i() + 3, "causal, offset 3"),
    "strict": (lambda pad: j() < i() + 3, "causal, offset 2"),
    "two causal terms": (lambda pad: (j() <= i() + 3) & (j() <= i() + 1), "causal, offset 1"),
    "tril": (lambda pad: torch.ones(L, L, dtype=torch.bool).tril(), "causal, offset 0"),
    "tril of numbers": (lambda pad: torch.tril(torch.ones(L, L)).bool(), "causal, offset 0"),
    "tril, view, slice": (
        lambda pad: torch.tril(torch.ones(2 * L, 2 * L)).view(1, 1, 2 * L, 2 * L)[:, :, :L, :L] == 1,
        "causal, offset 0",
    ),
    "slice of later rows": (
        lambda pad: torch.ones(2 * L, 2 * L, dtype=torch.bool).tril()[4 : L + 4, :L],
        "causal, offset 4",
    ),
    "not triu": (lambda pad: ~torch.ones(L, L, dtype=torch.bool).triu(1), "causal, offset 0"),
    "transposed twice": (
        lambda pad: (j().permute(1, 0) <= i().transpose(0, 1)).transpose(0, 1),
        "causal, offset 0",
    ),
    "wide window": (lambda pad: (j() <= i()) & (i() - j() < L), "causal, offset 0"),
    "padding": (lambda pad: pad[:, None, None, :], PAD),
    "padding by view": (lambda pad: pad.view(2, 1, 1, L), PAD),
    "padding by unsqueeze": (lambda pad: pad.unsqueeze(1).unsqueeze(2).expand(2, 1, L, L), PAD),
    "padding, one of two": (lambda pad: pad[:1, None, None, :], PAD),
    "padding, sliced": (
        lambda pad: torch.cat([pad, pad], 1)[:, None, None, 3 : L + 3],
        "key padding from the result of cat",
    ),
    "padding of four dimensions": (
        lambda pad: pad.float()[:, None, None, :].log() > -1,
        "key padding from the result of gt",
    ),
    "padding inverted": (lambda pad: ~(~pad)[:, None, None, :], PAD),
    "padding from ints": (lambda pad: pad.long()[:, None, None, :] != 0, PAD),
    "padding masked out": (lambda pad: (pad.long() == 0)[:, None, None, :].logical_not(), PAD),
    "gather": (
        lambda pad: pad[torch.arange(2)[:, None, None, None], torch.arange(L)[None, None, None, :]],
        PAD,
    ),
    "causal and padding": (
        lambda pad: (j() <= i()).logical_and(pad[:, None, None, :]),
        f"causal, offset 0; {PAD}",
    ),
    "product": (lambda pad: (j() <= i()) * pad[:, None, None, :], f"causal, offset 0; {PAD}"),
    "two paddings": (lambda pad: pad[:, None, None, :] & (torch.randn(2, 1, 1, L) < 9), f"{PAD} and the result of lt"),
    "transposed": (lambda pad: i() <= j(), "window 1, offset 0"),
    "triu": (lambda pad: torch.ones(L, L, dtype=torch.bool).triu(), "window 1, offset 0"),
    "later keys": (lambda pad: i() + 2 <= j(), "window 1, offset 2"),
    "window": (lambda pad: (j() <= i()) & (i() - j() < 4), "causal, offset 0; window 4"),
    "window on both sides": (lambda pad: (i() - j()).abs() <= 3, "causal, offset 3; window 7"),
    "diagonal": (lambda pad: j() == i(), "documents"),
    "blocks of four": (lambda pad: j() // 4 == i() // 4, "documents"),
    "documents": (
        lambda pad: (pad.cumsum(-1)[:, None, :, None] == pad.cumsum(-1)[:, None, None, :]) & (j() <= i()),
        "causal, offset 0; documents from the result of cumsum",
    ),
    "either padding": (lambda pad: pad[:, None, None, :] | (j() < 3), PAD),
    "absorbed": (lambda pad: (j() <= i()) | ((j() <= i()) & pad[:, None, None, :]), "causal, offset 0"),
    "de Morgan": (lambda pad: ~((j() > i()) | ~pad[:, None, None, :]), f"causal, offset 0; {PAD}"),
}


def packed(pad: torch.Tensor, step: int = 1, prepend: bool = True, at: torch.Tensor | None = None) -> torch.Tensor:
    """The mask of documents that begin where positions do not go up by `step`."""
    positions = torch.arange(L) % pad.sum(-1, keepdim=True)
    steps = torch.diff(positions, prepend=positions[:, :1] - 1 if prepend else positions[:, -1:], dim=-1)
    documents = (steps != step).cumsum(-1)
    at = positions if at is None else at
    return (documents[:, None, :, None] == documents[:, None, None]) & (at[:, None, None] <= at[:, None, :, None])


PASSED: dict[str, tuple[Build, str]] = {
    "twice as steep": (lambda pad: j() <= 2 * i(), "boolean mask"),
    "or": (lambda pad: (j() <= i()) | pad[:, None, None, :], "boolean mask from input pad"),
    "query padding": (
        lambda pad: pad[:, None, :, None] & (j() <= i()),
        "causal, offset 0; boolean mask from input pad",
    ),
    "blocks": (lambda pad: j() // 4 <= i() // 4, "boolean mask"),
    "packed, in other positions": (
        lambda pad: packed(pad, at=pad.cumsum(-1)),
        "documents from the result of cumsum; boolean mask from the result of cumsum",
    ),
    "packed by other steps": (
        lambda pad: packed(pad, step=2),
        "documents from the result of cumsum; boolean mask from the result of mod",
    ),
    "random": (lambda pad: torch.ones(L, L) > torch.zeros(L, L).cumsum(0), "boolean mask from the result of gt"),
}

NOT_PROVEN: dict[str, tuple[Build, str]] = {
    "nothing": (lambda pad: j() > i() + L, "hides every key"),
    "relative positions": (lambda pad: -(i() - j()).abs().float(), "additive bias with content"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", PROVEN)
def test_proven(name: str, dynamic: bool) -> None:
    build, expected = PROVEN[name]
    captured = prove(build, random_padding(), dynamic)
    decision = captured.only()
    assert decision.rewritten, decision.reason
    assert decision.mask == expected
    assert_no_mask_left(captured)


@pytest.mark.parametrize("prepend", [False, True])
def test_packed_documents(prepend: bool) -> None:
    decision = prove(lambda pad: packed(pad, prepend=prepend), random_padding()).only()
    assert decision.mask == "causal, offset 0; documents from the result of cumsum"


@pytest.mark.parametrize("name", PASSED)
def test_passed_as_a_boolean_mask(name: str) -> None:
    build, expected = PASSED[name]
    assert prove(build, random_padding()).only().mask == expected


@pytest.mark.parametrize("name", NOT_PROVEN)
def test_not_proven(name: str) -> None:
    build, reason = NOT_PROVEN[name]
    decision = prove(build, random_padding()).only()
    assert not decision.rewritten
    assert reason in decision.reason


def set_row(pad: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    mask[0, 3] = True
    return mask


def fill_view(pad: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    mask[0].fill_(True)
    return mask


def and_in_place(pad: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    mask &= torch.ones(L, L, dtype=torch.bool).triu(-3)
    return mask


def write_out(pad: torch.Tensor) -> torch.Tensor:
    mask = torch.ones(L, L, dtype=torch.bool).tril()
    torch.logical_or(mask, torch.ones(L, L, dtype=torch.bool).triu(9), out=mask)
    return mask


def change_padding(pad: torch.Tensor) -> torch.Tensor:
    mask = pad.clone()
    view = mask[:, None, None, :]
    mask[:, 2] = False
    return view


@pytest.mark.parametrize("build", [set_row, fill_view, write_out])
def test_masks_changed_in_place_are_passed_as_they_are(build: Build) -> None:
    assert prove(build).only().rewritten


@pytest.mark.parametrize(
    ("build", "mask"), [(and_in_place, "causal, offset 0; window 4"), (change_padding, "key padding")]
)
def test_masks_changed_in_place_are_proven(build: Build, mask: str) -> None:
    assert prove(build).only().mask.split(" from ")[0] == mask


def test_added_masks_changed_in_place_are_not_proven() -> None:
    decision = prove(lambda pad: torch.where(set_row(pad), 0.0, -math.inf).mul_(1)).only()
    assert not decision.rewritten
    assert "changed in place" in decision.reason


def test_a_mask_that_hides_everything() -> None:
    def build(pad: torch.Tensor) -> torch.Tensor:
        padding = pad[:, None, None, :]
        return padding & ~((j() <= i()) | padding)

    decision = prove(build, random_padding()).only()
    assert decision.rewritten, decision.reason


def test_symbolic_offset() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        past = k.shape[2] - q.shape[2]
        mask = torch.arange(k.shape[2])[None] <= torch.arange(q.shape[2])[:, None] + past
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = inputs(queries=20, keys=33)
    captured, output = capture(attend, *args, dynamic=True)
    torch.testing.assert_close(output, attend(*args))
    assert captured.only().rewritten, captured.only().reason


def test_the_less_of_a_number_and_a_symbolic_offset() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, past: int) -> torch.Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        return scaled_dot_product_attention(q, k, v, attn_mask=(j <= i + past) & (j <= i + 6))

    for past in (4, 9):
        torch._dynamo.reset()
        args = inputs(queries=20)
        captured, output = capture(attend, *args, past, dynamic=True)
        torch.testing.assert_close(output, attend(*args, past))
        assert captured.only().rewritten, captured.only().reason


def test_an_offset_that_the_graph_does_not_compute_stays_dense() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        offset = (k.shape[2] - 21) ** 2 - 140
        mask = torch.arange(k.shape[2]) < torch.arange(q.shape[2])[:, None] + offset
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    args = inputs(queries=20, keys=33)
    captured, output = capture(attend, *args, dynamic=True)
    torch.testing.assert_close(output, attend(*args))
    assert "does not compute as a number" in captured.only().reason


Sizes = Callable[[int, int], int]
WINDOWS: dict[str, Sizes] = {
    "argument": lambda w, length: w,
    "third": lambda w, length: length // 3,
    "half, rounded up": lambda w, length: (length + 1) // 2,
    "less of two": lambda w, length: min(w, length),
    "more of two": lambda w, length: max(w, 2),
    "remainder": lambda w, length: length % 7 + 2 * (length // 5) + 1,
    "absolute": lambda w, length: abs(-w),
}


def windowed(size: Sizes, causal: bool) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int) -> torch.Tensor:
        i, j, distance = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2]), size(w, q.shape[2])
        mask = (j <= i) & (i - j < distance) if causal else (i - j).abs() <= distance
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return attend


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_that_vary(name: str, causal: bool) -> None:
    """From the second distinct value on one graph serves them all, guarded by what was assumed of them."""
    calls = [([*inputs(queries=length), w], length) for length, w in ((20, 5), (23, 7), (31, 3), (26, 9), (40, 60))]
    captured = compare(windowed(WINDOWS[name], causal), *(args for args, _ in calls), dynamic=True)
    assert captured.only().rewritten, captured.only().reason
    assert "window" in captured.only().mask


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_that_becomes_dynamic(causal: bool) -> None:
    captured = Capture()
    attend = windowed(WINDOWS["argument"], causal)
    compiled = torch.compile(attend, backend=captured)
    for w in (5, 7, 3, 11):
        args = inputs(queries=20)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args, w), attend(*args, w))
    assert [decision.rewritten for decision in captured.decisions] == [True, True]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [5, 0, -3, sys.maxsize])
def test_windows_that_hide_all_or_nothing(first: int, causal: bool) -> None:
    """What the first window lets the prover assume does not hold for the others."""
    calls = [[*inputs(queries=20), w] for w in (first, 5, 0, 1, -1, -30, sys.maxsize, 2**41, 7)]
    compare(windowed(WINDOWS["argument"], causal), *calls, dynamic=True)


@pytest.mark.parametrize("first", [4, -4])
def test_bounds_of_either_sign(first: int) -> None:
    """``i - j <= w`` alone is a window, and ``j <= i + w`` an offset, whatever the sign of w."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int) -> torch.Tensor:
        i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        before, after = (scaled_dot_product_attention(q, k, v, attn_mask=mask) for mask in (i - j <= w, j <= i + w))
        return before + after

    captured = compare(attend, *([*inputs(queries=20), w] for w in (first, 3, -2, 9, -7, -25)), dynamic=True)
    assert all(decision.rewritten for decision in captured.decisions)


def test_the_least_of_two_windows() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: int, x: int) -> torch.Tensor:
        distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        mask = (distance < w) & (distance < x) & (distance > -x) & (distance > -3)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    captured = compare(attend, *([*inputs(queries=20), w, x] for w, x in ((4, 6), (7, 3), (2, 2))), dynamic=True)
    assert captured.only().rewritten


NUMBERS: dict[str, tuple[list[float], torch.dtype]] = {
    "fractions": ([0.0, 0.3, -0.2, 0.9], torch.float32),
    "bfloat16": ([0.0, 0.3, 1e-30, -0.0], torch.bfloat16),
    "float16": ([0.0, 0.3, 6e-8, math.nan], torch.float16),
    "float64": ([0.0, 1e-300, math.inf, -math.inf], torch.float64),
    "float8": ([0.0, 0.3, 2.0, 0.0], torch.float8_e4m3fn),
    "complex": ([0.0, 0.3, 2.0, -0.0], torch.complex64),
    "uint8": ([0, 255, 1, 128], torch.uint8),
    "int16": ([0, -1, 256, 5], torch.int16),
    "int64": ([0, 2**62, -(2**63), 2**32], torch.int64),
}
TO_BOOL: dict[str, Build] = {
    "bool": lambda m: m.bool(),
    "to": lambda m: m.to(torch.bool),
    "not": lambda m: m.to(torch.bool).logical_not(),
    "joined": lambda m: torch.logical_and(m.bool()[:, None, None], j() <= i()).squeeze(1),
    "ones": lambda m: (m.bool().float() == 1).bool(),
}


@pytest.mark.parametrize("cast", TO_BOOL)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_as_booleans(name: str, cast: str) -> None:
    values, dtype = NUMBERS[name]
    numbers = torch.tensor(values).repeat(2, L)[:, :L].to(dtype)

    def build(m: torch.Tensor) -> torch.Tensor:
        mask = TO_BOOL[cast](m)
        return mask[:, None] if mask.dim() == 3 else mask[:, None, None, :]

    assert prove(build, numbers).only().mask.split(" from ")[0].split("; ")[-1] == "key padding"


LARGEST = 2**63 - 1
SENTINELS: dict[str, Build] = {
    "window of each": lambda w: i() - j() < w[:, None, None, None, 0],
    "window on both sides": lambda w: (i() - j()).abs() <= w[:, None, None, None, 0],
    "lengths": lambda w: (j() < w[:, None, None, None, 0]) | (j() == 0),
    "order": lambda w: (w[:, None, :, None] >= w[:, None, None, :]) & (w[:, None, :, None] < w[:, None, None, :] + 5),
    "strict order": lambda w: (w[:, None, :, None] > w[:, None, None, :]) | (i() == j()),
    "difference": lambda w: (w[:, None, :, None] - w[:, None, None, :] < 4) | (i() == j()),
    "halves": lambda w: (w[:, None, :, None] + 1) // 2 == (w[:, None, None, :] + 1) // 2,
    "remainders": lambda w: (w[:, None, :, None] + 3) % 3 == w[:, None, None, :] % 3,
    "next": lambda w: (w + 1)[:, None, :, None] == (w + 1)[:, None, None, :],
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("name", SENTINELS)
def test_largest_numbers(name: str, dtype: torch.dtype) -> None:
    """The largest number of a dtype often stands for no limit, and sums with it overflow."""
    info = torch.iinfo(dtype)
    values = torch.tensor([[info.max, 1, 2, info.max, info.min, 7, 8, 3, 4, 5, 0, info.max], [3] * L], dtype=dtype)
    assert prove(SENTINELS[name], values).only().rewritten


def test_numbers_that_a_dtype_rounds() -> None:
    """What is compared is what the dtype holds: float16 rounds 0.1, and float32 2 ** 24 + 1."""
    for build in (
        lambda pad: (torch.full((L, L), 0.1, dtype=torch.float16).float() == 0.1) | (j() <= i()),
        lambda pad: (torch.full((L, L), 2**24 + 1).float() == 2**24) & (j() <= i()),
        lambda pad: (torch.full((L, L), 0.1).tril() < 0.1) | (j() <= i() - 2) | (j() == i()),
        lambda pad: (pad.long() * (2**24 + 1))[:, None, None, :] == 2.0**24,
    ):
        torch._dynamo.reset()
        prove(build)
