"""Calls of flex_attention: what is rewritten computes what the call computes eagerly, and what is not says why."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from s2o_compile.passes import rewrite

from ..examples import examples
from .capture import EXACT, Capture
from .compare import assert_refused, compare

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")

BATCH, HEADS, QUERIES, KEYS = 2, 4, 23, 37
Index = torch.Tensor
MaskMod = Callable[[Index, Index, Index, Index], torch.Tensor]
ScoreMod = Callable[[torch.Tensor, Index, Index, Index, Index], torch.Tensor]


class Buffers:
    """What mods may capture."""

    def __init__(self, documents: torch.Tensor, padding: torch.Tensor, row: torch.Tensor) -> None:
        self.documents, self.padding, self.row = documents, padding, row


Build = Callable[[Buffers], MaskMod]


def inputs(batch: int = BATCH, queries: int = QUERIES, keys: int = KEYS, key_heads: int = HEADS) -> list[torch.Tensor]:
    """Random query, key, value, documents, padding, and a row of the padding."""
    q = torch.randn(batch, HEADS, queries, 8)
    k, v = torch.randn(2, batch, key_heads, keys, 8)
    documents = torch.randint(0, 2, (batch, max(queries, keys))).cumsum(-1)
    padding = torch.rand(batch, max(queries, keys)) < 0.7
    return [q, k, v, documents, padding, padding[0].clone()]


def made_inside(build: Build, block_size: int = 16, **options: Any) -> Callable[..., torch.Tensor]:
    """Attention under a mask_mod whose blocks are made in the function."""

    def attend(q: Any, k: Any, v: Any, documents: Any, padding: Any, row: Any) -> torch.Tensor:
        mod = build(Buffers(documents, padding, row))
        blocks = create_block_mask(
            mod, q.shape[0], q.shape[1], q.shape[2], k.shape[2], device=q.device, BLOCK_SIZE=block_size
        )
        return flex_attention(q, k, v, block_mask=blocks, **options)

    return attend


def with_score_mod(mod: ScoreMod, **options: Any) -> Callable[..., torch.Tensor]:
    """Attention under a score_mod."""
    return lambda q, k, v, *_: flex_attention(q, k, v, score_mod=mod, **options)


def assert_rewritten(function: Callable[..., Any], *calls: Any, mask: str, dynamic: bool = False) -> Capture:
    """Check that the one call is rewritten in one compilation and `mask` is proven."""
    captured = compare(function, *calls, dynamic=dynamic)
    assert captured.only().rewritten, captured.only().reason
    assert captured.only().mask == mask
    assert not any(node.target is torch.ops.higher_order.flex_attention for node in captured.nodes())
    return captured


PROVEN: dict[str, tuple[Build, str]] = {
    "everything": (lambda x: lambda b, h, i, j: j >= 0, "everything"),
    "causal": (lambda x: lambda b, h, i, j: i >= j, "causal, offset 0"),
    "offset": (lambda x: lambda b, h, i, j: j - i <= 5, "causal, offset 5"),
    "window": (lambda x: lambda b, h, i, j: (i >= j) & (i - j < 7), "causal, offset 0; window 7"),
    "both sides": (lambda x: lambda b, h, i, j: (i - j).abs() <= 3, "causal, offset 3; window 7"),
    "padding": (lambda x: lambda b, h, i, j: x.padding[b, j], "key padding from input padding"),
    "padding of one row": (lambda x: lambda b, h, i, j: ~x.row[j], "key padding from input row"),
    "prefix": (lambda x: lambda b, h, i, j: j < 9, "key padding"),
    "documents": (
        lambda x: lambda b, h, i, j: (x.documents[b, i] == x.documents[b, j]) & (i >= j),
        "causal, offset 0; documents from input documents",
    ),
    "documents, indexed twice": (
        lambda x: lambda b, h, i, j: x.documents[b][i] == x.documents[b][j],
        "documents from input documents",
    ),
    "documents, gathered first": (
        lambda x: lambda b, h, i, j: (x.documents + 1)[b, i] == (x.documents + 1)[b, j],
        "documents from input documents",
    ),
    "documents of half the positions": (
        lambda x: lambda b, h, i, j: x.documents[b, i // 2] == x.documents[b, j],
        "documents from input documents",
    ),
    "chunks": (
        lambda x: lambda b, h, i, j: (i // 8 == j // 8) & (i >= j),
        "causal, offset 0; documents",
    ),
    "query padding": (
        lambda x: lambda b, h, i, j: x.padding[b, i] & (i >= j),
        "causal, offset 0; boolean mask from input padding",
    ),
    "some heads": (lambda x: lambda b, h, i, j: (h < 2) | x.padding[b, j], "boolean mask from input padding"),
    "one of the batch": (lambda x: lambda b, h, i, j: (b != 1) | (j < 20), "key padding"),
}


SECOND_CASES = {
    "offset", "padding of one row", "documents, indexed twice", "documents of half the positions", "one of the batch",
    "causal, the other way", "filled", "soft cap of another slope", "square", "inverse", "scaled by position",
    "steeper", "distances",
}  # fmt: skip
"""Mods of which there is another much like it; Dynamo takes long for `create_block_mask`."""


def quick_first(names: Iterable[str]) -> list[Any]:
    """The names of mods, of which the second cases are slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SECOND_CASES)) for name in names]


@pytest.mark.parametrize("name", quick_first(PROVEN))
def test_mask_mods(name: str) -> None:
    build, expected = PROVEN[name]
    assert_rewritten(made_inside(build), inputs(), mask=expected)


@pytest.mark.parametrize(
    "name",
    ["window", *quick_first(["documents, indexed twice"]), pytest.param("query padding", marks=pytest.mark.slow)],
)
def test_symbolic_sizes(name: str) -> None:
    build, expected = PROVEN[name]
    assert_rewritten(made_inside(build), inputs(), mask=expected, dynamic=True)


@pytest.mark.parametrize("block_size", [128, (8, 32)])
def test_block_sizes(block_size: Any) -> None:
    assert_rewritten(made_inside(PROVEN["causal"][0], block_size), inputs(), mask="causal, offset 0")


def test_a_block_mask_for_all_batches_and_heads() -> None:
    def attend(q: Any, k: Any, v: Any, *_: Any) -> torch.Tensor:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, QUERIES, KEYS, device="cpu", BLOCK_SIZE=16)
        return flex_attention(q, k, v, block_mask=blocks)

    assert_rewritten(attend, inputs(), mask="causal, offset 0")


def test_one_compilation_serves_all_lengths() -> None:
    calls = [inputs(batch, queries, queries) for batch, queries in ((2, 23), (3, 31), (4, 130))]
    build, expected = PROVEN["documents"]
    assert_rewritten(made_inside(build), *calls, mask=expected, dynamic=True)


def test_grouped_heads_scale_and_layout() -> None:
    def attend(q: Any, k: Any, v: Any, *_: Any) -> torch.Tensor:
        return flex_attention(q, k, v, scale=0.3, enable_gqa=True).transpose(1, 2).flatten(2)

    assert_rewritten(attend, inputs(key_heads=2), mask="everything")


@pytest.mark.parametrize("queries", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_few_queries(queries: int) -> None:
    build = PROVEN["padding"][0]
    assert_rewritten(made_inside(build), inputs(queries=queries), mask=PROVEN["padding"][1])


def tanh_of_masked(s: Any, b: Any, h: Any, i: Any, j: Any) -> torch.Tensor:
    return torch.tanh(torch.where(i >= j, s, -math.inf))


SCORE_MODS: dict[str, tuple[ScoreMod, str]] = {
    "identity": (lambda s, b, h, i, j: s, "everything"),
    "scale": (lambda s, b, h, i, j: s * 0.5 / 3, "everything"),
    "soft cap": (lambda s, b, h, i, j: 2 * torch.tanh(s / 2), "everything; soft cap 2"),
    "soft cap of another slope": (lambda s, b, h, i, j: (s * -3).tanh() * 2, "everything; soft cap 2"),
    "shift": (lambda s, b, h, i, j: s + 3, "everything"),
    "causal": (lambda s, b, h, i, j: torch.where(i >= j, s, -math.inf), "causal, offset 0"),
    "causal, the other way": (lambda s, b, h, i, j: torch.where(i < j, -math.inf, s * 2), "causal, offset 0"),
    "filled": (lambda s, b, h, i, j: s.masked_fill(i < j, -math.inf), "causal, offset 0"),
    "added": (lambda s, b, h, i, j: s + torch.where(i >= j, 0.0, -math.inf), "causal, offset 0"),
    "masked, then scaled": (lambda s, b, h, i, j: torch.where(i >= j, s, -math.inf) * 2, "causal, offset 0"),
    "capped, then masked": (
        lambda s, b, h, i, j: torch.where((i >= j) & (i - j < 5), 3 * torch.tanh(s / 3), -math.inf),
        "causal, offset 0; window 5; soft cap 3",
    ),
}


@pytest.mark.parametrize("name", quick_first(SCORE_MODS))
def test_score_mods(name: str) -> None:
    mod, expected = SCORE_MODS[name]
    assert_rewritten(with_score_mod(mod), inputs(), mask=expected)


def test_score_mod_and_mask_mod() -> None:
    function = made_inside(PROVEN["causal"][0], score_mod=lambda s, b, h, i, j: 4 * torch.tanh(s / 4))
    assert_rewritten(function, inputs(), mask="causal, offset 0; soft cap 4")


CONTENT = "only factors, a tanh soft-cap and masks with -inf can be proven"
REFUSED_SCORE_MODS: dict[str, tuple[ScoreMod, str]] = {
    "relative positions": (lambda s, b, h, i, j: s + (j - i), CONTENT),
    "ALiBi": (lambda s, b, h, i, j: s + torch.exp2(-(h + 1.0)) * (j - i), CONTENT),
    "square": (lambda s, b, h, i, j: s * s, CONTENT),
    "inverse": (lambda s, b, h, i, j: 1 / s, CONTENT),
    "sine": (lambda s, b, h, i, j: s.sin(), CONTENT),
    "scaled by position": (lambda s, b, h, i, j: s * torch.where(i >= j, 1.0, 2.0), CONTENT),
    "minus the score": (lambda s, b, h, i, j: 1 - s, CONTENT),
    "of the score": (lambda s, b, h, i, j: torch.where(s > 0, s, -math.inf), "cannot be read"),
    "finite": (lambda s, b, h, i, j: torch.where(i >= j, s, -5.0), "use -inf"),
    "negated": (lambda s, b, h, i, j: -1 * torch.where(i >= j, s, -math.inf), "negates masked scores"),
    "masked, then capped": (tanh_of_masked, "mask them afterwards"),
    "shifted, then capped": (lambda s, b, h, i, j: torch.tanh(s + 1), "mask them afterwards"),
    "zero": (lambda s, b, h, i, j: s * 0, "use another number"),
    "capped far above": (lambda s, b, h, i, j: 1e32 * torch.tanh(s / 1e32), "a soft-cap of 1e+32 caps nothing"),
}


@pytest.mark.parametrize("name", quick_first(REFUSED_SCORE_MODS))
def test_refused_score_mods(name: str) -> None:
    mod, reason = REFUSED_SCORE_MODS[name]
    function = with_score_mod(mod)
    if name == "negated":
        captured = Capture()
        torch.compile(function, backend=captured)(*inputs())
        assert reason in captured.only().reason
    else:
        assert_refused(function, inputs(), reason=reason)


REFUSED_MASK_MODS: dict[str, tuple[Build, str]] = {
    "prefix of a causal mask": (lambda x: lambda b, h, i, j: (i >= j) | x.padding[b, j], "flex_attention never stores"),
    "steeper": (lambda x: lambda b, h, i, j: j <= 2 * i, "flex_attention never stores"),
    "window of each head": (lambda x: lambda b, h, i, j: i - j < h + 2, "flex_attention never stores"),
    "nothing": (lambda x: lambda b, h, i, j: j < 0, "hides every key"),
    "negative index": (lambda x: lambda b, h, i, j: x.padding[b, j - 3], "cannot be read"),
    "distances": (lambda x: lambda b, h, i, j: x.row[(i - j).abs()], "flex_attention never stores"),
    "random access": (lambda x: lambda b, h, i, j: x.row[x.documents[b, j]], "computes getitem"),
}


@pytest.mark.parametrize("name", quick_first(REFUSED_MASK_MODS))
def test_refused_mask_mods(name: str) -> None:
    build, reason = REFUSED_MASK_MODS[name]
    assert_refused(made_inside(build), inputs(), reason=reason)


def causal(b: Index, h: Index, i: Index, j: Index) -> torch.Tensor:
    return i >= j


def blocks_of(mod: Any, q: torch.Tensor, k: torch.Tensor, batch: int | None = None) -> BlockMask:
    return create_block_mask(mod, batch, None, q.shape[2], k.shape[2], device="cpu", BLOCK_SIZE=16)


def test_blocks_that_are_an_input_are_refused() -> None:
    q, k, v, *_ = inputs()

    def attend(q: Any, k: Any, v: Any, blocks: BlockMask) -> torch.Tensor:
        return flex_attention(q, k, v, block_mask=blocks)

    assert_refused(attend, (q, k, v, blocks_of(causal, q, k)), reason="made outside of the compiled function")


def test_blocks_that_are_a_constant_are_refused() -> None:
    q, k, v, *_ = inputs()
    blocks = blocks_of(causal, q, k)
    assert_refused(
        lambda q, k, v: flex_attention(q, k, v, block_mask=blocks), (q, k, v), reason="outside of the compiled function"
    )


def other_mask_mod(q: Any, k: Any, documents: Any) -> BlockMask:
    blocks = blocks_of(causal, q, k)
    blocks.mask_mod = lambda b, h, i, j: i + 3 >= j
    return blocks


def without_mask_mod(q: Any, k: Any, documents: Any) -> BlockMask:
    blocks = blocks_of(causal, q, k)
    return BlockMask.from_kv_blocks(blocks.kv_num_blocks, blocks.kv_indices, BLOCK_SIZE=16, seq_lengths=(QUERIES, KEYS))


def only_partial(q: Any, k: Any, documents: Any) -> BlockMask:
    blocks = blocks_of(causal, q, k)
    return BlockMask.from_kv_blocks(
        blocks.kv_num_blocks, blocks.kv_indices, BLOCK_SIZE=16, mask_mod=causal, seq_lengths=(QUERIES, KEYS)
    )


def of_the_first_in_the_batch(q: Any, k: Any, documents: Any) -> BlockMask:
    return blocks_of(lambda b, h, i, j: documents[b, i] == documents[b, j], q, k)


def cropped(q: Any, k: Any, documents: Any) -> BlockMask:
    longer = torch.cat([q, q], 2), torch.cat([k, k], 2)
    return blocks_of(causal, *longer)._adjust(q.shape[2], k.shape[2])


@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        *((make, (QUERIES, KEYS)) for make in (other_mask_mod, only_partial)),
        pytest.param(without_mask_mod, (QUERIES, KEYS), marks=pytest.mark.slow),
        (of_the_first_in_the_batch, (QUERIES, KEYS)),
        (cropped, (32, 48)),  # torch 2.11 crops to whole blocks.
    ],
)
def test_blocks_of_another_mask_are_refused(make: Callable[..., BlockMask], lengths: tuple[int, int]) -> None:
    def attend(q: Any, k: Any, v: Any, documents: Any, *_: Any) -> torch.Tensor:
        return flex_attention(q, k, v, block_mask=make(q, k, documents))

    assert_refused(attend, inputs(BATCH, *lengths), reason="not known to be those of its mask_mod")


def test_blocks_changed_in_place_are_refused() -> None:
    def attend(q: Any, k: Any, v: Any, *_: Any) -> torch.Tensor:
        blocks = blocks_of(causal, q, k)
        blocks.kv_num_blocks.zero_()
        return flex_attention(q, k, v, block_mask=blocks)

    assert_refused(attend, inputs(), reason="changed in place")


def test_a_key_changed_in_place_before() -> None:
    def attend(q: Any, k: Any, v: Any, *_: Any) -> torch.Tensor:
        k = k.clone()
        k[:, :, 3:] += 1
        return flex_attention(q, k, v, block_mask=blocks_of(causal, q, k))

    assert_rewritten(attend, inputs(), mask="causal, offset 0", dynamic=True)


@pytest.mark.parametrize("when", [pytest.param("before", marks=pytest.mark.slow), "between", "after"])
def test_buffers_changed_in_place_are_refused(when: str) -> None:
    def attend(q: Any, k: Any, v: Any, documents: torch.Tensor, *_: Any) -> torch.Tensor:
        documents = documents.clone()
        if when == "before":
            documents[:, 4:] += 1
        blocks = blocks_of(lambda b, h, i, j: documents[b, i] == documents[b, j], q, k, BATCH)
        if when == "between":
            documents[:, 4:] += 1
        result = flex_attention(q, k, v, block_mask=blocks)
        if when == "after":
            documents[:, 4:] += 1
        return result + documents.sum()

    assert_refused(attend, inputs(), reason="changed in place")


def test_statistics_that_are_used_are_refused() -> None:
    def attend(q: Any, k: Any, v: Any, *_: Any) -> Any:
        output, statistics = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
        return output, statistics.lse

    assert_refused(attend, inputs(), reason="log-sum-exp")


def test_statistics_that_are_not_used_are_dropped() -> None:
    assert_rewritten(
        lambda q, k, v, *_: flex_attention(q, k, v, return_aux=AuxRequest(lse=True))[0], inputs(), mask="everything"
    )


def test_no_mask_over_queries_and_keys_is_computed() -> None:
    """What made the blocks has no use left, and a compiler drops it."""
    kept: list[torch.fx.Node] = []

    def keep(module: torch.fx.GraphModule, inputs: Any) -> Any:
        kept.extend(module.graph.nodes)
        return module.forward

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        assert rewrite(module, EXACT)[0].rewritten
        return aot_autograd(fw_compiler=keep)(module, inputs)

    args = inputs()
    function = made_inside(PROVEN["documents"][0])
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(function, backend=backend)(*args), function(*args))
    shapes = [tuple(node.meta["val"].shape) for node in kept if isinstance(node.meta.get("val"), torch.Tensor)]
    assert shapes
    assert not any({QUERIES, KEYS} <= set(shape) for shape in shapes)


INTEGERS: list[Callable[..., Any]] = [
    lambda x, b, h, i, j: i,
    lambda x, b, h, i, j: j,
    lambda x, b, h, i, j: i - j,
    lambda x, b, h, i, j: (i - j).abs(),
    lambda x, b, h, i, j: i + b,
    lambda x, b, h, i, j: j - h,
    lambda x, b, h, i, j: i // 4,
    lambda x, b, h, i, j: j // 4,
    lambda x, b, h, i, j: j % 5,
    lambda x, b, h, i, j: x.documents[b, i],
    lambda x, b, h, i, j: x.documents[b][j],
    lambda x, b, h, i, j: x.documents[0, j],
    lambda x, b, h, i, j: x.documents[b, i // 2],
]
PREDICATES: list[Callable[..., Any]] = [
    lambda x, b, h, i, j: i >= j,
    lambda x, b, h, i, j: i - j < 6,
    lambda x, b, h, i, j: x.documents[b, i] == x.documents[b, j],
    lambda x, b, h, i, j: x.padding[b, j],
    lambda x, b, h, i, j: x.padding[b][i],
    lambda x, b, h, i, j: ~x.row[j],
    lambda x, b, h, i, j: h != 1,
    lambda x, b, h, i, j: i.new_ones((), dtype=torch.bool),
]
COMPARISONS = [operator.le, operator.lt, operator.ge, operator.gt, operator.eq, operator.ne]


@st.composite
def comparisons(draw: Any) -> Callable[..., Any]:
    left, right = draw(st.sampled_from(INTEGERS)), draw(st.sampled_from(INTEGERS))
    compare, shift = draw(st.sampled_from(COMPARISONS)), draw(st.integers(-3, 3))
    return lambda *args: compare(left(*args) + shift, right(*args))


def joined(inner: Any) -> Any:
    def join(form: Callable[[Any, Any], Any], left: Any, right: Any) -> Callable[..., Any]:
        return lambda *args: form(left(*args), right(*args))

    def negate(predicate: Any) -> Callable[..., Any]:
        return lambda *args: ~predicate(*args)

    return st.builds(join, st.sampled_from([operator.and_, operator.and_, operator.or_]), inner, inner) | inner.map(
        negate
    )


def mask_mods() -> Any:
    return st.recursive(comparisons() | st.sampled_from(PREDICATES), joined, max_leaves=4)


@settings(max_examples=examples(6))
@given(mask_mods(), st.integers(0, 2**16), st.booleans(), st.booleans())
def test_no_mask_mod_gives_another_result(mod: Any, seed: int, dynamic: bool, as_score_mod: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)

    def masked_score(q: Any, k: Any, v: Any, documents: Any, padding: Any, row: Any) -> torch.Tensor:
        x = Buffers(documents, padding, row)
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: torch.where(mod(x, b, h, i, j), s, -math.inf))

    blocked = made_inside(lambda x: lambda b, h, i, j: mod(x, b, h, i, j))
    compare(masked_score if as_score_mod else blocked, inputs(), dynamic=dynamic)
