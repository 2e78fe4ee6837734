"""Dense attention without masks: in pieces, and by the kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import dense as dense_module
from s2o_compile.ops import pieces
from s2o_compile.ops.dense import attend_without_mask
from s2o_compile.ops.kernels.dense import attend_densely
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from .comparison import allowed_error, dense, largest_difference, seen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies the bits of bfloat16.
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")]
PADDINGS = ("none", "left", "right", "both", "holes", "all")


@st.composite
def padding(draw: st.DrawFn, batch: int, keys: int) -> torch.Tensor | None:
    """Of each batch entry another kind; None for none at all."""
    if draw(st.booleans()):
        return None
    kept = torch.ones(batch, keys, dtype=torch.bool)
    for row in kept:
        kind, first, last = draw(st.sampled_from(PADDINGS)), draw(st.integers(0, keys)), draw(st.integers(0, keys))
        row[: first if kind in ("left", "both") else 0] = False
        row[last if kind in ("right", "both") else keys :] = False
        if kind == "holes":
            row &= torch.rand(keys) > 0.3
        if kind == "all":
            row[:] = False
    return kept


@st.composite
def documents(draw: st.DrawFn, batch: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """In runs, or in any order."""
    kind = draw(st.sampled_from(["none", "runs", "any"]))
    if kind == "none":
        return None
    if kind == "any":
        return torch.randint(3, (batch, queries)), torch.randint(3, (batch, keys), dtype=torch.int32)
    places = torch.arange(max(queries, keys)).expand(batch, -1) // draw(st.sampled_from([3, 50, 90]))
    return places[:, :queries].int(), places[:, :keys]


Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@st.composite
def calls(draw: st.DrawFn, longest: int = 330) -> tuple[Operands, Visibility]:
    """Query, key and value over ragged lengths, widths and strides, and terms."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    lengths = st.sampled_from([length for length in (1, 7, 64, 65, 129, 200, 331) if length <= longest])
    batch, kv_heads, per_kv_head = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(lengths), draw(lengths)
    width, wide = draw(st.sampled_from([(16, 16), (24, 40), (64, 64)]))
    query = torch.randn(batch, queries, kv_heads * per_kv_head, width).transpose(1, 2)
    key = torch.randn(batch, kv_heads, keys, width)
    value = torch.randn(batch, kv_heads, wide, keys).transpose(2, 3) if draw(st.booleans()) else key.new_zeros(0)
    value = value if value.numel() else torch.randn(batch, kv_heads, keys, wide)
    offset = draw(st.sampled_from([0, keys - queries, 5, -5, 400]))
    of_queries, of_keys = draw(documents(batch, queries, keys)) or (None, None)
    window = draw(st.sampled_from([None, 5, 64, 100]))
    terms = Visibility(draw(st.booleans()), offset, draw(padding(batch, keys)), window, of_queries, of_keys)
    return (query, key, value), terms


def moved(operands: Operands, terms: Visibility, dtype: torch.dtype = torch.float32) -> tuple[Operands, Visibility]:
    query, key, value = (x.to(DEVICE, dtype) for x in operands)
    return (query, key, value), Visibility(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in terms))


@given(calls())
def test_pieces_agree_with_a_mask(call: tuple[Operands, Visibility]) -> None:
    operands, terms = moved(*call)
    got = pieces.attend_in_pieces(*operands, terms, 0.3)
    assert largest_difference(got, dense(*operands, seen(*operands[:2], terms), 0.3)) < 1e-5


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("offset", [0, 1, 57])
def test_rows_whose_elements_lie_apart(place: int, offset: int) -> None:
    """Of queries, keys or values, as where channels are moved behind the positions and nothing is copied."""
    torch.manual_seed(offset)
    operands = [torch.randn(1, 1, length, 16, device=DEVICE) for length in (43, 43 + offset, 43 + offset)]
    operands[place] = operands[place].mT.contiguous().mT
    terms = Visibility(True, offset)
    got = pieces.attend_in_pieces(*operands, terms, 0.3)
    assert largest_difference(got, dense(*operands, seen(*operands[:2], terms), 0.3)) < 1e-5


@pytest.mark.parametrize("rows", [16, 100])
@given(call=calls())
def test_pieces_of_any_size(rows: int, call: tuple[Operands, Visibility]) -> None:
    operands, terms = moved(*call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "ROWS", rows)
        got = pieces.attend_in_pieces(*operands, terms, 0.3)
    assert largest_difference(got, dense(*operands, seen(*operands[:2], terms), 0.3)) < 1e-5


@settings(max_examples=examples(10))
@given(calls(longest=130), st.sampled_from(DTYPES), st.sampled_from([0.0, 4.0, 1e30]))
def test_the_kernel_agrees_with_a_mask(call: tuple[Operands, Visibility], dtype: torch.dtype, softcap: float) -> None:
    operands, terms = moved(*call, dtype)
    mask = seen(*operands[:2], terms)
    want = dense(*operands, mask, 0.3, softcap)
    got, lse = attend_densely(*operands, terms, 0.3, softcap)
    assert largest_difference(got, want) <= allowed_error(*operands, mask, want, 0.3)
    unseen = ~mask.expand(*got.shape[:3], -1).any(-1)
    assert torch.equal(lse == -torch.inf, unseen)


def test_the_kernel_ignores_what_no_row_sees() -> None:
    """NaN and Inf in padding, and before a window."""
    query, key, value = (torch.randn(1, 2, 200, 16, device=DEVICE) for _ in range(3))
    kept = torch.ones(1, 200, dtype=torch.bool, device=DEVICE)
    kept[:, :90] = False
    clean = attend_densely(query, key, value, Visibility(True, 0, kept), 0.3, 0.0)[0]
    key[:, :, :90], value[:, :, :90] = torch.nan, torch.inf
    assert torch.equal(attend_densely(query, key, value, Visibility(True, 0, kept), 0.3, 0.0)[0], clean)


def test_the_kernel_attends_again_where_weights_outgrow_a_maximum() -> None:
    """Late queries see far larger logits before the keys that are attended first."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 300, 16, device=DEVICE) for _ in range(3))
    key[:, :, :64] *= 60
    mask = seen(query, key, Visibility(True))
    want = dense(query, key, value, mask, 1.0)
    # Logits of a thousand, rounded in float32.
    assert largest_difference(attend_densely(query, key, value, Visibility(True), 1.0, 0.0)[0], want) < 1e-3


@pytest.mark.parametrize(
    ("padded", "softcap", "sinks"), list(itertools.product([False, True], [0.0, 3.0], [False, True]))
)
def test_the_operator_runs_dense_with_all_terms(padded: bool, softcap: float, sinks: bool) -> None:
    """Long enough that a mask is not written out."""
    torch.manual_seed(int(padded))
    query, key, value = (torch.randn(1, heads, 1100, 16, device=DEVICE) for heads in (2, 1, 1))
    terms: dict[str, Any] = {"is_causal": True, "window": 300}
    if padded:
        terms["key_padding"] = (torch.arange(1100, device=DEVICE) > 77)[None]
    sink = torch.tensor([0.3, -1.0], device=DEVICE) if sinks else None
    want = dense(query, key, value, seen(query, key, Visibility(**terms)), None, softcap, sink)
    got = torch.ops.s2o.attention(query, key, value, **terms, softcap=softcap, sinks=sink, min_length=2**20)
    assert largest_difference(got, want) < 1e-5


@pytest.mark.parametrize("operand", ["query", "all"])
def test_opcheck(operand: str) -> None:
    query, key, value = (torch.randn(2, heads, 60, 16, device=DEVICE) for heads in (4, 2, 2))
    kept = (torch.arange(60, device=DEVICE) > 7).expand(2, -1)
    documents = (torch.arange(60, device=DEVICE) // 20).expand(2, -1)
    arguments = (query, key, value, True, 0, kept, 30, documents, documents, 0.3, 0.0, None)
    if operand == "query":
        arguments = (query, key, value, True, 0, None, None, None, None, 0.3, 0.0, None)
    torch.library.opcheck(torch.ops.s2o.dense.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "kind", ["bottom right", "after one key", "wide", "window", "narrow window", "padding", "documents", "sinks"]
)
def test_on_a_gpu(kind: str, width: int, dtype: torch.dtype) -> None:
    """What a call chooses there, at lengths that fill tiles."""
    torch.manual_seed(width)
    queries = {"bottom right": 700, "after one key": 1999}.get(kind, 2000)
    query = torch.randn(2, queries, 6, width, device="cuda", dtype=dtype).transpose(1, 2)
    # FlashAttention takes no values of another width.
    wide = width // 2 if kind == "wide" else width
    key, value = (torch.randn(2, 2, 2000, size, device="cuda", dtype=dtype) for size in (width, wide))
    terms, sinks = Visibility(True, 2000 - queries), None
    places = torch.arange(2000, device="cuda").expand(2, -1)
    if kind == "padding":
        terms = terms._replace(key_padding=places >= torch.tensor([[500], [3]], device="cuda"))
    elif kind == "documents":
        terms = terms._replace(query_documents=places // 700, key_documents=places // 700)
    elif "window" in kind or kind in ("sinks", "wide"):
        terms = terms._replace(window=100 if kind in ("narrow window", "wide") else 1500)
        sinks = torch.randn(6, device="cuda") if kind == "sinks" else None
    if sinks is not None and not dense_module.attends_by_kernel(query):
        pytest.skip("the operator does not take this path")
    mask = seen(query, key, terms)
    want = dense(query, key, value, mask, 0.1, sinks=sinks)
    got = attend_without_mask(query, key, value, terms, 0.1, 0.0, sinks)
    assert largest_difference(got, want) <= allowed_error(query, key, value, mask, want, 0.1)
