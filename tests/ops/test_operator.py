"""The registered operator: schema, validation, the dispatch of path, and what it does at the edges."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile import attention
from s2o_compile.integrations import settings
from s2o_compile.ops import AttentionResult, Ranking, S2OConfig, config
from s2o_compile.ops.kernels import pipeline
from s2o_compile.ops.visibility import Visibility

from .comparison import dense, largest_difference, seen
from .strategies import Call, calls, configs

OPERATORS = [
    torch.ops.s2o.attention.default,
    torch.ops.s2o.attention_stats.default,
    torch.ops.s2o.attention_dynamic.default,
]


def inputs(length: int = 200, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(length)
    return (
        torch.randn(2, 4, length, 32, dtype=dtype),
        torch.randn(2, 2, length, 32, dtype=dtype),
        torch.randn(2, 2, length, 48, dtype=dtype),
    )


def all_terms(length: int) -> dict[str, Any]:
    """Every term at once, for `inputs`."""
    positions = torch.arange(length)
    return {
        "is_causal": True,
        "causal_offset": 5,
        "key_padding": (positions % 11 > 0).expand(2, -1),
        "window": 60,
        "query_documents": (positions // 70).expand(2, -1),
        "key_documents": (positions // 70).int().expand(2, -1),
        "mask": (positions[:, None] + positions) % 7 > 0,
        "softcap": 5.0,
        "sinks": torch.tensor([0.0, -2.0, 3.0, -torch.inf]),
    }


def dense_with_terms(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: dict[str, Any]
) -> torch.Tensor:
    """Dense attention with the operator's arguments."""
    visibility = Visibility(**{name: x for name, x in terms.items() if name in Visibility._fields})
    mask = seen(query, key, visibility)
    return dense(query, key, value, mask, softcap=terms.get("softcap", 0.0), sinks=terms.get("sinks"))


@pytest.mark.parametrize("min_length", [0, None])
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator: Any, min_length: int | None) -> None:
    padding = torch.ones(2, 100, dtype=torch.bool)
    padding[0, :30] = False
    torch.library.opcheck(operator, (*inputs(100), True, 0, padding), {"min_length": min_length})
    torch.library.opcheck(operator, inputs(100), {"min_length": min_length, "threshold": 0.01})
    torch.library.opcheck(operator, inputs(100), {"min_length": min_length, **all_terms(100)})


def test_opcheck_of_the_inner_operator() -> None:
    settings = S2OConfig(threshold=0.001).as_json
    torch.library.opcheck(torch.ops.s2o.sparse.default, (*inputs(100), True, 0, *[None] * 5, 0.2, 0.0, "", settings))
    visibility = Visibility(*(all_terms(100)[name] for name in Visibility._fields))
    visibility = visibility._replace(mask=visibility.mask[None, None])
    torch.library.opcheck(torch.ops.s2o.sparse.default, (*inputs(100), *visibility, 0.2, 5.0, "a site", settings))


def test_schema_has_the_defaults_of_the_configuration() -> None:
    schema = torch.ops.s2o.attention.default._schema
    defaults = {argument.name: argument.default_value for argument in schema.arguments if argument.kwarg_only}
    assert defaults == S2OConfig().arguments()


@given(calls(longest=120, settings=configs(thresholds=(0.0,))))
def test_every_path_agrees_at_threshold_zero(call: Call) -> None:
    tensors, terms = call.tensors(), call.arguments()
    want = dense(*tensors, seen(*tensors[:2], call.visibility()), softcap=call.softcap, sinks=call.sinks())
    arguments = call.config.arguments()
    for min_length in (0, 10**6):
        output = torch.ops.s2o.attention(*tensors, **terms, **{**arguments, "min_length": min_length})
        assert largest_difference(output, want) < 1e-5
    stats = torch.ops.s2o.attention_stats(*tensors, **terms, **{**arguments, "min_length": 10**6})
    assert largest_difference(stats[0], want) < 1e-5


@pytest.mark.parametrize("min_length", [0, None])
@pytest.mark.parametrize("shape", [(0, 4, 10, 10), (2, 4, 0, 10), (2, 4, 10, 0), (2, 4, 0, 0)])
def test_empty(shape: tuple[int, int, int, int], min_length: int | None) -> None:
    batch, heads, queries, keys = shape
    query, key, value = (
        torch.randn(batch, heads, queries, 16),
        *(torch.randn(batch, 2, keys, n) for n in (16, 24)),
    )
    output = torch.ops.s2o.attention(query, key, value, min_length=min_length)
    assert output.shape == (batch, heads, queries, 24) and not output.any()
    result = torch.ops.s2o.attention_stats(query, key, value, min_length=min_length)
    assert (result[1] == -torch.inf).all() and not result[2].any()
    sinks = torch.arange(heads, dtype=torch.float32)
    output, lse, _ = torch.ops.s2o.attention_stats(query, key, value, sinks=sinks, min_length=min_length)
    assert not output.any() and torch.equal(lse, sinks[:, None].expand_as(lse))


SIZES = ["batch", "heads", "groups", "queries", "keys", "channels", "value_channels"]


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **arguments: bool) -> torch.Tensor:
    """SDPA, with a channel of zeros where there are no channels, for which torch 2.12 gives zeros."""
    if not query.shape[-1]:
        query, key = (torch.nn.functional.pad(x, (0, 1)) for x in (query, key))
    return scaled_dot_product_attention(query, key, value, **arguments)


@pytest.mark.parametrize("min_length", [0, None])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("zeros", [x for n in (1, 2) for x in itertools.combinations(SIZES, n)], ids="-".join)
def test_sizes_of_zero_give_what_sdpa_gives(zeros: tuple[str, ...], is_causal: bool, min_length: int | None) -> None:
    sizes = dict(zip(SIZES, (2, 4, 2, 30, 40, 16, 24), strict=True)) | dict.fromkeys(zeros, 0)
    batch, heads, groups, queries, keys, channels, value_channels = sizes.values()
    query = torch.randn(batch, heads, queries, channels)
    key, value = (torch.randn(batch, groups, keys, size) for size in (channels, value_channels))
    # Of heads without keys SDPA is not asked: some releases divide by their number.
    want = torch.zeros(batch, heads, queries, value_channels)
    if groups:
        want = sdpa(query, key, value, is_causal=is_causal, enable_gqa=True)
    arguments = {"is_causal": is_causal, "min_length": min_length, "threshold": 0.0}
    output = torch.ops.s2o.attention(query, key, value, **arguments)
    assert output.dtype == want.dtype and output.shape == want.shape
    assert largest_difference(output, want) < 1e-6
    result = AttentionResult(*torch.ops.s2o.attention_stats(query, key, value, **arguments))
    assert torch.equal(result.output, output) or largest_difference(result.output, want) < 1e-6
    seen_keys = torch.arange(1, queries + 1).float() if is_causal else torch.full((queries,), float(keys))
    if "channels" in zeros and keys and groups:
        assert largest_difference(result.lse, seen_keys.log().expand_as(result.lse)) < 1e-5
    assert result.lse.shape == query.shape[:3]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in (query, key, value)]
        assert torch.ops.s2o.attention(*fake, **arguments).shape == want.shape
        assert [x.shape for x in torch.ops.s2o.attention_stats(*fake, **arguments)] == [x.shape for x in result]


@pytest.mark.parametrize("zero", [{"batch"}, {"heads", "groups"}, {"queries"}, {"keys"}, {"channels"}, {"values"}])
def test_sizes_of_zero_compile(zero: set[str]) -> None:
    names = ("batch", "heads", "groups", "queries", "keys", "channels", "values")
    batch, heads, groups, queries, keys, channels, values = (
        0 if name in zero else size for name, size in zip(names, (2, 4, 4, 30, 40, 16, 24), strict=True)
    )
    query = torch.randn(batch, heads, queries, channels)
    key, value = torch.randn(batch, groups, keys, channels), torch.randn(batch, groups, keys, values)
    torch.compiler.reset()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(query, key, value)

    compiled = torch.compile(attend, backend="s2o", options={"threshold": 0.0, "min_length": 0}, fullgraph=True)
    want, got = scaled_dot_product_attention(query, key, value), compiled(query, key, value)
    assert got.shape == want.shape and largest_difference(got, want) < 1e-6


@pytest.mark.parametrize("scale", [-0.5, -1e-40, 0.0])
@pytest.mark.parametrize("min_length", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [90, 5])
def test_scales_of_zero_and_below(queries: int, dtype: torch.dtype, min_length: int, scale: float) -> None:
    """SDPA's fused kernel for a CPU, which takes values as wide as keys, gives NaN for them with a causal mask."""
    triangle = torch.ones(90, 90, dtype=torch.bool).tril()[-queries:]
    query, *rest = (x[..., :32] for x in inputs(90, dtype))
    query, arguments = query[:, :, -queries:], {"scale": scale, "min_length": min_length, "threshold": 0.0}
    causal = {"is_causal": True, "causal_offset": 90 - queries}
    capped, sunk = {"softcap": 3.0}, {"sinks": torch.tensor([0.0, -2.0, 3.0, -torch.inf])}
    for terms, mask, extra in (
        (causal, triangle, {}),
        (causal, triangle, capped),
        (causal, triangle, sunk),
        ({"mask": triangle}, triangle, {}),
        ({}, triangle | True, {}),
    ):
        want = dense(query, *rest, mask, scale=scale, **extra)
        got = torch.ops.s2o.attention(query, *rest, **terms, **extra, **arguments)
        assert got.dtype == dtype
        assert largest_difference(got, want) < (1e-5 if dtype == torch.float32 else 0.02)
    stats = torch.ops.s2o.attention_stats(query, *rest, **causal, **arguments)
    assert largest_difference(stats[0], torch.ops.s2o.attention(query, *rest, **causal, **arguments)) < 0.02


@pytest.mark.parametrize("threshold", [0.0, 1e-2])
def test_the_sign_of_a_scale_is_that_of_queries(threshold: float) -> None:
    query, key, value = inputs(300)
    arguments = {"is_causal": True, "min_length": 0, "threshold": threshold}
    got = torch.ops.s2o.attention(query, key, value, scale=-0.3, **arguments)
    assert torch.equal(got, torch.ops.s2o.attention(-query, key, value, scale=0.3, **arguments))


def test_scales_that_change_their_sign_compile() -> None:
    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.ops.s2o.attention(query, key, value, is_causal=True, scale=scale, threshold=0.0)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = torch.ones(100, 100, dtype=torch.bool).tril()
    for scale in (0.3, 0.4, -0.5, 0.0, 0.6):
        tensors = [x[..., :32] for x in inputs(100)]
        assert largest_difference(compiled(*tensors, scale), dense(*tensors, mask, scale=scale)) < 1e-5


def test_a_thousand_settings_stay_cached() -> None:
    """Those of a calibrated model: each is checked and parsed once, however many there are."""

    class Configuration:
        def __init__(self, threshold: float) -> None:
            self.s2o = {"threshold": threshold, "min_length": 10**6}

    query = torch.empty(1, 2, 20, 16, device="meta")
    thresholds = [n / 2000 for n in range(1000)]

    def attend_with_each() -> None:
        for threshold in thresholds:
            torch.ops.s2o.attention_stats(query, query, query, threshold=threshold, min_length=10**6)
            settings.settings_of(Configuration(threshold))

    caches = [S2OConfig.from_arguments, S2OConfig.from_json, config.replaced, settings._checked]
    attend_with_each()
    before = [cache.cache_info() for cache in caches]
    attend_with_each()
    for cache, info in zip(caches, before, strict=True):
        now = cache.cache_info()
        assert now.misses == info.misses and now.hits >= info.hits + 1000


@pytest.mark.parametrize("min_length", [0, 10**6])
def test_rows_that_see_nothing_are_zero(min_length: int) -> None:
    query, key, value = inputs(100)
    padding = torch.ones(2, 100, dtype=torch.bool)
    padding[1] = False
    output = torch.ops.s2o.attention(
        query, key, value, is_causal=True, causal_offset=-20, key_padding=padding, min_length=min_length
    )
    assert not output[1].any() and not output[0, :, :20].any() and output[0, :, 20:].any(-1).all()


@pytest.mark.parametrize("min_length", [0, 10**6])
@pytest.mark.parametrize(
    "terms",
    [
        {"causal_offset": 150, "window": 20},
        {"query_documents": torch.zeros(2, 100).int(), "key_documents": torch.ones(2, 100).long()},
        {"mask": torch.zeros(1, dtype=torch.bool)},
    ],
    ids=["window", "documents", "mask"],
)
def test_rows_from_which_a_term_hides_everything_are_zero(terms: dict[str, Any], min_length: int) -> None:
    """A window that ends behind the last key, a document without keys, a mask of nothing."""
    rows = slice(-69, None) if "window" in terms else slice(None)
    sinks = torch.tensor([-1.0, 0.0, 1.0, 2.0])
    for extra, nothing in (({}, torch.full((4,), -torch.inf)), ({"sinks": sinks}, sinks)):
        output, lse, _ = torch.ops.s2o.attention_stats(*inputs(100), **terms, **extra, min_length=min_length)
        assert not output[:, :, rows].any() and (lse[:, :, rows] == nothing[:, None]).all()
        assert not torch.ops.s2o.attention(*inputs(100), **terms, **extra, min_length=min_length)[:, :, rows].any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["query", "key", "value"])
@pytest.mark.parametrize("threshold", [0.0, 1e-2])
def test_bad_numbers_spread_no_further_than_in_dense_attention(bad: float, which: str, threshold: float) -> None:
    tensors = dict(zip(("query", "key", "value"), inputs(300), strict=True))
    tensors[which][0, 1, 170, 3] = bad
    output = torch.ops.s2o.attention(**tensors, is_causal=True, min_length=0, threshold=threshold, last_queries=40)
    want = scaled_dot_product_attention(*tensors.values(), is_causal=True, enable_gqa=True)
    assert not (~output.isfinite() & want.isfinite()).any()
    if threshold == 0:
        clean = inputs(300)
        unharmed = scaled_dot_product_attention(*clean, is_causal=True, enable_gqa=True)
        assert largest_difference(output[:, :, :170], unharmed[:, :, :170]) < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_padding_holds_does_not_matter(bad: float) -> None:
    query, key, value = inputs(200)
    padding = torch.ones(2, 200, dtype=torch.bool)
    padding[:, :50] = False
    arguments = {"is_causal": True, "key_padding": padding, "min_length": 0}
    want = torch.ops.s2o.attention(query, key, value, **arguments)
    key[:, :, :50], value[:, :, :50] = bad, bad
    assert torch.equal(torch.ops.s2o.attention(query, key, value, **arguments), want)


def packed() -> list[torch.Tensor]:
    """Query, key and value in one tensor [batch, length, heads, 3, channels], past its first elements."""
    storage = torch.randn(2 * 90 * 4 * 3 * 16 + 7)[7:].view(2, 90, 4, 3, 16)
    return [x.transpose(1, 2) for x in storage.unbind(3)]


LAYOUTS = {
    "packed": packed,
    "channels first": lambda: [torch.randn(2, 16, 4, 90).permute(0, 2, 3, 1) for _ in "qkv"],
    "one head for all": lambda: [torch.randn(2, 4, 90, 16), *torch.randn(2, 2, 1, 90, 16).expand(2, 2, 4, 90, 16)],
    "one batch entry for all": lambda: list(torch.randn(3, 1, 4, 90, 16).expand(3, 2, 4, 90, 16)),
    "one key for all": lambda: [torch.randn(2, 4, 90, 16), *torch.randn(2, 2, 4, 1, 16).expand(2, 2, 4, 90, 16)],
    "one channel for all": lambda: list(torch.randn(3, 2, 4, 90, 1).expand(3, 2, 4, 90, 16)),
    "overlapping": lambda: list(torch.randn(3, 2, 4, 105).unfold(-1, 16, 1)),
    "single": lambda: list(torch.randn(3, 1, 1, 1, 1).as_strided((3, 1, 1, 1, 1), (1, 9, 9, 9, 9))),
}


@pytest.mark.parametrize("threshold", [0.0, 1e-2])
@pytest.mark.parametrize("min_length", [0, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_do_not_matter(layout: str, min_length: int, threshold: float) -> None:
    torch.manual_seed(3)
    tensors, arguments = LAYOUTS[layout](), {"is_causal": True, "min_length": min_length, "threshold": threshold}
    want = torch.ops.s2o.attention(*(x.contiguous() for x in tensors), **arguments)
    for mode in (contextlib.nullcontext(), torch.no_grad(), torch.inference_mode()):
        with mode:
            got = torch.ops.s2o.attention(*tensors, **arguments)
        assert largest_difference(got, want) < 1e-6
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.ops.s2o.attention(*(x.to(dtype) for x in tensors), **arguments).dtype == dtype


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("term", ["window", "documents", "mask"])
def test_what_hidden_keys_hold_does_not_matter(term: str, bad: float, softcap: float) -> None:
    """Keys that only some rows see harm no other row."""
    query, key, value = inputs(200)
    positions = torch.arange(200)
    documents = (positions // 90).expand(2, -1)
    terms = {
        "window": {"is_causal": True, "window": 50},
        "documents": {"query_documents": documents, "key_documents": documents},
        "mask": {"mask": positions[:, None] // 90 == positions // 90},
    }[term]
    arguments = {
        **terms,
        "softcap": softcap,
        "min_length": 0,
        "threshold": 0.0,
        "settings": Ranking(near_keys=0).as_json,
    }
    want = torch.ops.s2o.attention(query, key, value, **arguments)
    key[:, :, :50], value[:, :, :50] = bad, bad
    got = torch.ops.s2o.attention(query, key, value, **arguments)
    assert largest_difference(got[:, :, 100:], want[:, :, 100:]) < 1e-6


@pytest.mark.parametrize("min_length", [0, 10**6])
@pytest.mark.parametrize("ranking", [Ranking(), Ranking(pool=4, rule="means")], ids=["default", "means"])
def test_a_window_that_hides_nothing_changes_nothing(ranking: Ranking, min_length: int) -> None:
    arguments = {"is_causal": True, "min_length": min_length, "threshold": 1e-2, "settings": ranking.as_json}
    want = torch.ops.s2o.attention(*inputs(300), **arguments)
    for window in (300, 10**9):
        assert torch.equal(torch.ops.s2o.attention(*inputs(300), window=window, **arguments), want)


@pytest.mark.parametrize("min_length", [0, 10**6])
@pytest.mark.parametrize("is_causal", [True, False])
def test_documents_are_a_block_diagonal_mask(is_causal: bool, min_length: int) -> None:
    lengths = torch.tensor([30, 1, 120, 149])
    documents = torch.arange(4).repeat_interleave(lengths).expand(2, -1)
    mask = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    arguments = {"is_causal": is_causal, "min_length": min_length, "threshold": 1e-2}
    got = torch.ops.s2o.attention(*inputs(300), query_documents=documents, key_documents=documents, **arguments)
    assert torch.equal(got, torch.ops.s2o.attention(*inputs(300), mask=mask, **arguments))


def test_other_documents_and_keys_before_the_window_are_not_visited() -> None:
    query, key, value = inputs(2000)
    documents = (torch.arange(2000) // 200).expand(2, -1)
    for terms in ({"window": 200}, {"query_documents": documents, "key_documents": documents}):
        arguments = {"is_causal": True, "min_length": 0, "threshold": 0.0, **terms}
        visited = torch.ops.s2o.attention_stats(query, key, value, **arguments)[2]
        assert visited.sum((0, 2)).max() / 2 < 2000 * (200 + 3 * 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5, 30])
def test_decoding_with_terms(queries: int, dtype: torch.dtype) -> None:
    query, key, value = inputs(100, dtype)
    query, terms = query[:, :, -queries:], all_terms(100)
    terms |= {
        "causal_offset": 100 - queries,
        "query_documents": terms["query_documents"][:, -queries:],
        "mask": terms["mask"][-queries:],
    }
    output = torch.ops.s2o.attention(query, key, value, **terms)
    want = dense_with_terms(query, key, value, terms)
    assert output.dtype == dtype
    assert largest_difference(output, want) < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("min_length", [0, 10**6])
def test_masks_of_any_rank_and_stride(min_length: int) -> None:
    tensors, arguments = inputs(100), {"min_length": min_length, "threshold": 0.0}
    keys, pairs = torch.arange(100) % 3 > 0, torch.rand(100, 100) < 0.5
    for mask in (keys, pairs, pairs.T, pairs[None], pairs.expand(2, 4, 100, 100), keys.expand(2, 1, 100, 100)):
        want = dense_with_terms(*tensors, {"mask": mask})
        assert largest_difference(torch.ops.s2o.attention(*tensors, mask=mask, **arguments), want) < 1e-5


def test_gradients_are_refused_and_inference_works() -> None:
    query, key, value = inputs()
    want = torch.ops.s2o.attention(query, key, value, min_length=0)
    value.requires_grad_()
    with pytest.raises(ValueError, match="no backward"):
        torch.ops.s2o.attention(query, key, value, min_length=0)
    with torch.no_grad():
        assert torch.equal(torch.ops.s2o.attention(query, key, value, min_length=0), want)
    with torch.inference_mode():
        assert torch.equal(torch.ops.s2o.attention(query, key, value, min_length=0), want)


@pytest.mark.parametrize("min_length", [0, None])
def test_autocast(min_length: int | None) -> None:
    query, key, value = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.ops.s2o.attention(query, key.bfloat16(), value, min_length=min_length)
    assert output.dtype == torch.bfloat16
    want = torch.ops.s2o.attention(query, key, value, min_length=min_length)
    assert largest_difference(output, want) < 0.05


@pytest.mark.parametrize("min_length", [0, 1000])
def test_autocast_changes_no_dtype_where_a_graph_was_traced_without_it(min_length: int) -> None:
    query, key, value = (torch.randn(1, 2, 40, 16) for _ in "qkv")
    arguments = query, key, value, True
    expected = torch.ops.s2o.attention_dynamic(*arguments, min_length=min_length)
    with torch.autocast("cpu", torch.bfloat16):
        output = torch.ops.s2o.attention_dynamic(*arguments, min_length=min_length)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "extra", [{}, {"softcap": 2.0}, {"settings": '{"measure": "output"}'}, {"settings": '{"rule": "means"}'}]
)
def test_autocast_reaches_no_step_of_the_computation(extra: dict[str, Any]) -> None:
    query, key, value = (x.bfloat16() for x in inputs(300))
    arguments = {"is_causal": True, "min_length": 0, **extra}
    want = torch.ops.s2o.attention(query, key, value, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.ops.s2o.attention(query, key, value, **arguments), want)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"query": torch.zeros(4, 10, 16)}, ValueError, "query must have 4 dimensions"),
        (
            {"key": torch.zeros(1, 3, 10, 16), "value": torch.zeros(1, 3, 10, 16)},
            ValueError,
            "multiple of the heads",
        ),
        ({"key": torch.zeros(1, 2, 10, 8)}, ValueError, "key must have the channels of query"),
        ({"value": torch.zeros(1, 2, 11, 16)}, ValueError, "value must have the length of key"),
        ({"value": torch.zeros(1, 4, 10, 16)}, ValueError, "value must have the heads of key"),
        ({"value": torch.zeros(2, 2, 10, 16)}, ValueError, "value must have the batch size of query"),
        (
            {"key": torch.zeros(1, 2, 10, 16, dtype=torch.float16)},
            TypeError,
            "key must have the dtype of query",
        ),
        ({"query": torch.zeros(1, 4, 10, 16, dtype=torch.float64)}, TypeError, "query must be float16"),
        ({"key": torch.zeros(1, 2, 10, 16, device="meta")}, ValueError, "key must be on the device of query"),
        ({"query": torch.zeros(1, 4, 10, 300)}, ValueError, "query must have at most 256 channels, not 300"),
        ({"key_padding": torch.zeros(1, 9, dtype=torch.bool)}, ValueError, "key_padding must be"),
        ({"key_padding": torch.zeros(1, 10)}, TypeError, "key_padding must be boolean"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"window": 0}, ValueError, "window must be at least 1, or None for no window, not 0"),
        (
            {"query_documents": torch.zeros(1, 10).int()},
            ValueError,
            "query_documents and key_documents must be given together, not query_documents alone",
        ),
        ({"key_documents": torch.zeros(1, 10).int()}, ValueError, "not key_documents alone"),
        (
            {"query_documents": torch.zeros(1, 10), "key_documents": torch.zeros(1, 10).int()},
            TypeError,
            "query_documents must be int32 or int64, not float32",
        ),
        (
            {"query_documents": torch.zeros(1, 10).int(), "key_documents": torch.zeros(1, 9).int()},
            ValueError,
            r"key_documents must be \[batch, keys\] \(1, 10\), not \(1, 9\)",
        ),
        ({"mask": torch.zeros(10, 10)}, TypeError, "mask must be boolean, True for pairs that may attend, not float32"),
        (
            {"mask": torch.zeros(9, 10, dtype=torch.bool)},
            ValueError,
            r"mask must .* broadcast to \[batch, heads, queries, keys\] \(1, 4, 10, 10\), not \(9, 10\)",
        ),
        ({"mask": torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool)}, ValueError, "mask must have 1 to 4 dimensions"),
        ({"mask": torch.zeros(10, dtype=torch.bool, device="meta")}, ValueError, "mask must be on the device of query"),
        ({"softcap": -1.0}, ValueError, r"softcap must be between 0 \(for none\) and 1e\+30, not -1.0"),
        ({"softcap": float("inf")}, ValueError, "softcap must be between 0 .* not inf"),
        ({"softcap": 2e30}, ValueError, "softcap must be between 0 .* not 2e[+]30"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be \[heads of query\] \(4,\), not \(3,\)"),
        ({"sinks": torch.zeros(4).int()}, TypeError, "sinks must be floating, not int32"),
        ({"threshold": -1.0}, ValueError, "threshold must be a number from 0"),
        ({"threshold": float("nan")}, ValueError, "threshold must be a number from 0"),
        ({"settings": '{"pool": 64}'}, ValueError, r"pool must be a power of two up to segment \(32\), not 64"),
        ({"settings": '{"pools": 4}'}, ValueError, "unknown field 'pools'; the fields of Ranking are rule, pool"),
        ({"settings": '{"tile": 16}'}, ValueError, "tile was removed: it follows segment"),
        ({"settings": "pool=4"}, ValueError, "settings must be '' or a JSON object of fields of Ranking, not 'pool=4'"),
        ({"settings": "[]"}, ValueError, "settings must be '' or a JSON object of fields of Ranking"),
        ({"min_length": -1}, ValueError, "min_length must be"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {
        "query": torch.zeros(1, 4, 10, 16),
        "key": torch.zeros(1, 2, 10, 16),
        "value": torch.zeros(1, 2, 10, 16),
    }
    with pytest.raises(error, match=message) as raised:
        torch.ops.s2o.attention(**{**good, **change})
    assert "\n" not in str(raised.value)


def test_windows_of_any_length_compile_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def model(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return torch.ops.s2o.attention(query, key, key, is_causal=True, window=64)

    compiled = torch.compile(model, backend=counter, dynamic=True)
    for length in (40, 2100, 300):
        query, key = torch.randn(1, 2, length, 16), torch.randn(1, 1, length, 16)
        torch.testing.assert_close(compiled(query, key), model(query, key))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "config", [None, S2OConfig(threshold=0.0123, ranking=Ranking(sample=3))], ids=["default", "new"]
)
def test_compiles_without_a_break(config: S2OConfig | None) -> None:
    """Also with settings that were never used before."""
    query, key, value = inputs(40)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key, value, True, config=config), attention(query, key, value, True))


@pytest.mark.parametrize("min_length", [0, 150])
def test_dynamic_shapes_compile_once(min_length: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.s2o.attention(
            query, key, value, is_causal=True, threshold=0, min_length=min_length, last_queries=10
        )

    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for length in (100, 130, 149, 150, 220):
        tensors = inputs(length)
        want = dense(*tensors, torch.ones(length, length, dtype=torch.bool).tril())
        assert largest_difference(compiled(*tensors), want) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("min_length", [0, 150])
@pytest.mark.parametrize("dynamic", [False, True])
def test_terms_compile(dynamic: bool, min_length: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def model(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, terms: dict[str, Any]) -> torch.Tensor:
        return torch.ops.s2o.attention(query * 1, key, value, **terms, softcap=5.0, threshold=0, min_length=min_length)

    compiled = torch.compile(model, backend=counter, dynamic=dynamic, fullgraph=True)
    lengths = (100, 140, 220) if dynamic else (100,)
    for length in lengths:
        tensors, terms = inputs(length), all_terms(length)
        want = dense_with_terms(*tensors, terms)
        # Dynamo compiles a second time for a number that is not an integer.
        del terms["softcap"]
        assert largest_difference(compiled(*tensors, terms), want) < 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "packaging, settings",
    [
        (False, {}),
        (True, {}),
        (True, {"settings": Ranking(rule="means").as_json}),
        (True, S2OConfig.paper().arguments()),
    ],
)
def test_only_packages_see_the_kernels(
    packaging: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = Mock(side_effect=lambda query, key, value, *rest: AttentionResult.empty(query, value, 32))
    monkeypatch.setattr(pipeline, "sparse_triton", kernels)
    with FakeTensorMode(), V.set_aot_compilation(packaging):
        args = [torch.empty(1, 2, 128, 16, device="cuda", dtype=torch.bfloat16) for _ in "qkv"]
        graph = make_fx(lambda *args: torch.ops.s2o.attention(*args, **{**settings, "min_length": 0}))(*args).graph
    shows_kernels = packaging and not settings
    assert kernels.called == shows_kernels
    assert (torch.ops.s2o.sparse.default in {node.target for node in graph.nodes}) != shows_kernels
