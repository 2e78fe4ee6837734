"""Packed and paged requests in one call: as each request alone, whatever lies beside its keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

from s2o_compile import S2OConfig, attention, attention_varlen
from s2o_compile.ops import observe, packed, paged, requests
from s2o_compile.ops.config import replaced
from s2o_compile.ops.memory import limited_workspace
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.reference_varlen import reference_attention_varlen
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from .comparison import largest_difference
from .packing import BATCH, BLOCK_SIZES, LAYOUTS, Packing, assert_rows, dense_of, packings, visible
from .strategies import configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def terms_of(call: Packing, query: torch.Tensor, key: torch.Tensor) -> Visibility:
    """What the operator is told of a request alone, of [B, H, L, D]."""
    (left, right), offset = call.window_size, key.shape[2] - query.shape[2]
    window = None if left < 0 else left + 1 + max(right, 0)
    return Visibility(right >= 0, offset + max(right, 0), window=window)


def alone(call: Packing, number: int, config: S2OConfig, device: str = "cpu") -> torch.Tensor:
    """The operator called on one request, in contiguous tensors, [Lq, Hq, Dv]."""
    query, key, value = (x.transpose(0, 1)[None] for x in call.requests(device)[number])
    terms, extra = terms_of(call, query, key), {"softcap": call.softcap, "sinks": call.sinks(device)}
    output = attention(query, key, value, **terms._asdict(), scale=call.scale, **extra, config=config)
    return output[0].transpose(0, 1)


@settings(max_examples=examples(60))
@given(packings(), configs(thresholds=(0.0,)), st.sampled_from([0, 10**6, 150]))
def test_threshold_zero_is_dense_attention_of_each_request(call: Packing, config: S2OConfig, min_length: int) -> None:
    got = attention_varlen(**call.arguments(DEVICE), config=replaced(config, min_length=min_length))
    assert_rows(call, got, dense_of(call, DEVICE), 2e-5)


@settings(max_examples=examples(60))
@given(packings(), configs(), st.sampled_from([0, 150] if DEVICE == "cpu" else [0]))
def test_each_request_has_the_bits_of_the_operator_alone(call: Packing, config: S2OConfig, min_length: int) -> None:
    config = replaced(config, min_length=min_length)
    got = attention_varlen(**call.arguments(DEVICE), config=config)
    for number, rows in enumerate(call.rows):
        assert torch.equal(got[rows], alone(call, number, config, DEVICE))


@pytest.mark.parametrize("block_size", [None, *BLOCK_SIZES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_block_sizes(layout: str, block_size: int | None) -> None:
    call, config = dataclasses.replace(BATCH, layout=layout, block_size=block_size), S2OConfig(min_length=0)
    got = attention_varlen(**call.arguments(DEVICE), config=config)
    for number, rows in enumerate(call.rows):
        assert torch.equal(got[rows], alone(call, number, config, DEVICE))


def specified(call: Packing, config: S2OConfig, is_sparse: Sequence[bool] | None = None) -> torch.Tensor:
    """The reference in float64 for the arguments of a call on a CPU."""
    arguments = call.arguments(dtype=torch.float64)
    lengths = [None if arguments[name] is None else arguments[name].tolist() for name in LENGTHS]
    table = None if call.block_size is None else arguments["block_table"].tolist()
    operands = (arguments[name] for name in ("query", "key", "value"))
    terms = {name: arguments[name] for name in ("window_size", "scale", "softcap", "sinks")}
    return reference_attention_varlen(*operands, *lengths, table, **terms, config=config, is_sparse=is_sparse)


LENGTHS = ("cu_seq_q", "cu_seq_k", "seqused_k")


@settings(max_examples=examples(20))
@given(packings(longest=70), configs(thresholds=(0.0,)))
def test_the_reference_is_dense_attention_at_threshold_zero(call: Packing, config: S2OConfig) -> None:
    assert_rows(call, specified(call, config), dense_of(call, dtype=torch.float64), 1e-12)


@settings(max_examples=examples(20))
@given(packings(longest=70), configs(), st.data())
def test_the_reference_is_that_of_each_request(call: Packing, config: S2OConfig, data: st.DataObject) -> None:
    """Whose operator is tested elsewhere, and gives the bits of a request alone."""
    is_sparse = [data.draw(st.booleans()) for _ in call.lengths]
    want = []
    for operands, sparse in zip(call.requests(dtype=torch.float64), is_sparse, strict=True):
        query, key, value = (x.transpose(0, 1)[None] for x in operands)
        of_request = config if sparse else replaced(config, threshold=0.0)
        extra = {"scale": call.scale, "softcap": call.softcap, "sinks": call.sinks(), "config": of_request}
        result = reference_attention(query, key, value, terms_of(call, query, key), **extra)
        want.append(result.output[0].transpose(0, 1))
    assert_rows(call, specified(call, config, is_sparse), want, 0.0)


class Sparse:
    """Records the lengths of calls that run sparse."""

    def __init__(self) -> None:
        self.lengths: list[tuple[int, int]] = []

    def record(self, call: observe.SparseInputs, result: Any, seconds: Any) -> None:
        self.lengths.append((call.query.shape[2], call.key.shape[2]))


@pytest.mark.parametrize(
    "config, sparse",
    [
        (S2OConfig(), []),
        (S2OConfig(min_length=150), [(200, 200), (64, 301)]),
        (S2OConfig(min_length=250), [(64, 301)]),
        (S2OConfig(min_length=150, last_queries=64), [(200, 200)]),
    ],
)
def test_requests_are_chosen_by_their_own_shapes(config: S2OConfig, sparse: list[tuple[int, int]]) -> None:
    recorder = Sparse()
    with observe.recording(recorder):
        got = attention_varlen(**BATCH.arguments(DEVICE), config=config)
    assert recorder.lengths == sparse
    assert got[: BATCH.rows[-1].stop].isfinite().all()


@pytest.mark.parametrize("kind", ["list", "int32", "int64", "strided"])
def test_lengths_of_any_kind(kind: str) -> None:
    arguments = BATCH.arguments()
    want = attention_varlen(**arguments)
    for name in ("cu_seq_q", "seqused_k"):
        numbers = arguments[name].long()
        kinds = {"list": numbers.tolist(), "int32": numbers.int(), "int64": numbers}
        arguments[name] = kinds.get(kind, numbers.repeat_interleave(2)[::2])
    assert torch.equal(attention_varlen(**arguments), want)


def test_lengths_on_a_device_are_fetched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []

    class Away(torch.Tensor):
        """A tensor that says that it is on a device."""

        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda")

        def tolist(self) -> list[int]:
            copies.append(tuple(self.shape))
            return self.as_subclass(torch.Tensor).tolist()

    tensors = [torch.tensor(x).as_subclass(Away) for x in ([0, 2, 5], [0, 4, 9], [3, 5])]
    found = requests.read_requests(*tensors, paged=False)
    assert copies == [(8,)]
    assert found == requests.read_requests(*(x.as_subclass(torch.Tensor) for x in tensors), paged=False)
    assert [(x.rows, x.keys) for x in found] == [(slice(0, 2), slice(0, 3)), (slice(2, 5), slice(4, 9))]


@pytest.mark.parametrize("min_length", [0, 10**6])
def test_the_output_is_written_to_its_rows_alone(min_length: int) -> None:
    call = dataclasses.replace(BATCH, lengths=((3, 0), *BATCH.lengths))
    arguments, config = call.arguments(DEVICE), S2OConfig(min_length=min_length)
    want = attention_varlen(**arguments, config=config)
    buffer = torch.full((len(want) + 9, 2 * BATCH.heads, BATCH.value_channels + 2), 7.0, device=DEVICE)
    out = buffer[4:-5, ::2, 1:-1]
    assert attention_varlen(**arguments, out=out, config=config) is out
    end = call.rows[-1].stop
    assert torch.equal(out[:end], want[:end]) and not out[:3].any()
    out[:end] = 7
    assert (buffer == 7).all()


@pytest.mark.parametrize("heads, kv_heads, channels", [(4, 0, 8), (0, 2, 8), (0, 0, 8), (4, 2, 0)])
def test_the_kernel_of_few_queries_is_not_asked_where_there_is_nothing(
    heads: int, kv_heads: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    query, key = torch.zeros(1, heads, channels), torch.zeros(5, kv_heads, channels)
    assert not packed.Packed(query, key, key, *[None] * 7).decodes
    assert packed.Packed(torch.zeros(1, 4, 8), *[torch.zeros(5, 2, 8)] * 2, *[None] * 7).decodes


def test_packed_keys_are_not_copied() -> None:
    pool = torch.randn(20, 2, 8)
    some = [requests.Request(0, slice(0, 3), slice(2, 9)), requests.Request(1, slice(3, 4), slice(9, 12))]
    assert paged.gathered(pool, None, some).data_ptr() == pool[2:].data_ptr()
    assert torch.equal(paged.gathered(pool, None, some[::-1]), torch.cat([pool[9:12], pool[2:9]]))


def test_nothing_to_do() -> None:
    arguments = BATCH.arguments()
    arguments |= {"cu_seq_q": [0], "seqused_k": [], "block_table": arguments["block_table"][:0]}
    assert not attention_varlen(**arguments).any()
    pages = {name: arguments[name][:0] for name in ("key", "value")}
    empty = {"cu_seq_q": [0, 0, 3], "seqused_k": [0, 0], "block_table": torch.zeros(2, 0, dtype=torch.int32)}
    assert not attention_varlen(**arguments | pages | empty).any()


def attend_naively(query: Any, key: Any, value: Any, query_lengths: Any, key_lengths: Any, window: Any, scale: Any):
    """`attend_packed` on a CPU, and what it asks for."""
    assert all(key_lengths) and (scale is None or scale > 0) and max(window) < 2**31
    outputs, lses = [], []
    parts = query.split(query_lengths), key.split(key_lengths), value.split(key_lengths)
    for q, k, v in zip(*parts, strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        logits = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        logits = logits.masked_fill(~visible(len(q), len(k), tuple(window), "cpu"), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1).nan_to_num(0), v))
        lses.append(logits.logsumexp(-1))
    return torch.cat(outputs), torch.cat(lses, 1)


@settings(max_examples=examples(60))
@given(packings(), st.sampled_from([150, 10**6]))
def test_what_flash_attention_gets_and_gives(call: Packing, min_length: int) -> None:
    """Elsewhere than on a GPU it is replaced by a loop."""
    call = dataclasses.replace(call, softcap=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "can_attend_packed", lambda *_: True)
        patch.setattr(packed, "attend_packed", attend_naively)
        got = attention_varlen(**call.arguments(), config=S2OConfig(threshold=0.0, min_length=min_length))
    assert_rows(call, got, dense_of(call), 2e-5)


@pytest.mark.parametrize("by_flash", [False, True])
@pytest.mark.parametrize("window_size", [(2**40, 2**40), (2**63 - 1, 2**63 - 1), (2**63 - 1, 0), (0, 2**32)])
def test_windows_of_more_keys_than_32_bits_count(
    window_size: tuple[int, int], by_flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = dataclasses.replace(BATCH, window_size=window_size)
    if by_flash:
        monkeypatch.setattr(packed, "can_attend_packed", lambda *_: True)
        monkeypatch.setattr(packed, "attend_packed", attend_naively)
    got = attention_varlen(**call.arguments(), config=S2OConfig(threshold=0.0, min_length=250))
    assert_rows(call, got, dense_of(call), 2e-5)


@pytest.mark.parametrize("block_size, sizes", [(None, [5]), (1, [1, 2, 1, 1])])
def test_pages_are_gathered_within_the_workspace(block_size: int | None, sizes: list[int]) -> None:
    call = dataclasses.replace(BATCH, block_size=block_size).arguments()
    some = [requests.Request(n, slice(n, n + 1), slice(0, keys)) for n, keys in enumerate((300, 100, 100, 50, 400))]
    shared = packed.Packed(*(call.get(name) for name in ("query", "key", "value", "block_table")), *[None] * 6)
    with limited_workspace(200 * 2 * (16 + 24) * 4):
        assert [len(group) for group in shared.that_fit(some)] == sizes
        assert shared.that_fit([]) == []


@pytest.mark.parametrize("min_length", [0, 10**6])
@pytest.mark.parametrize("ends", [[300], [64, 300], [77, 100, 300], [1, 299, 300]])
def test_every_cut_into_chunks_is_the_same_at_threshold_zero(ends: list[int], min_length: int) -> None:
    """And at others not: docs/limits.md."""
    call = dataclasses.replace(BATCH, lengths=((300, 300),), window_size=(100, 0), padding=0)
    arguments, config = call.arguments(), S2OConfig(threshold=0.0, min_length=min_length)
    query, parts = arguments.pop("query"), []
    for start, end in zip([0, *ends], ends, strict=False):
        lengths = {"cu_seq_q": [0, end - start], "seqused_k": [end]}
        parts.append(attention_varlen(query[start:end], **arguments | lengths, config=config))
    assert largest_difference(torch.cat(parts), dense_of(call)[0]) < 2e-5


@pytest.mark.parametrize("block_size", [None, 16])
@pytest.mark.parametrize("min_length", [0, 150, 10**6])
def test_opcheck(min_length: int, block_size: int | None) -> None:
    call = dataclasses.replace(BATCH, block_size=block_size, sunk=True, softcap=3.0)
    arguments = {**call.arguments(DEVICE), "min_length": min_length, "window_size": [-1, 0]}
    # NaN differs from itself.
    arguments = {k: x.nan_to_num(0) if torch.is_tensor(x) else x for k, x in arguments.items()}
    names = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
    packed = [arguments.pop(name) for name in names]
    torch.library.opcheck(torch.ops.s2o.attention_varlen.default, packed, arguments)
    out = packed[0].new_zeros(*packed[0].shape[:2], call.value_channels)
    torch.library.opcheck(torch.ops.s2o.attention_varlen_out.default, [out, *packed], arguments)
    inner = [arguments.get(name) for name in ("scale", "window_size", "seqused_k", "block_table", "softcap", "sinks")]
    text = S2OConfig(min_length=min_length).as_json
    torch.library.opcheck(torch.ops.s2o.varlen.default, [out, *packed, *inner, "a site", text])


def test_batches_of_other_lengths_are_not_compiled_again() -> None:
    counter, counts = CompileCounterWithBackend("aot_eager"), []
    config = S2OConfig(min_length=150)
    config.arguments()  # Dynamo cannot enter the lock of a cached property that has no value yet.

    def model(query: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
        return attention_varlen(query * 1, **arguments, config=config) + 1

    compiled = torch.compile(model, backend=counter, dynamic=True, fullgraph=True)
    for lengths in (BATCH.lengths, ((40, 170), (1, 3), (2, 2)), ((1, 5), (60, 160))):
        arguments = dataclasses.replace(BATCH, lengths=lengths).arguments()
        arguments |= {"max_q": 200, "max_k": 400}
        query = arguments.pop("query").nan_to_num(0)
        assert torch.equal(compiled(query, arguments), model(query, arguments))
        counts.append(counter.frame_count)
    # The first time twice, for the numbers that are not integers.
    assert counts[0] <= 2 and set(counts) == {counts[0]}


@pytest.mark.parametrize("min_length", [0, 10**6])
def test_inductor(min_length: int) -> None:
    arguments = BATCH.arguments()
    config, query = S2OConfig(min_length=min_length), arguments.pop("query").nan_to_num(0)
    config.arguments()

    def model(query: torch.Tensor) -> torch.Tensor:
        return attention_varlen(query * 2, **arguments, config=config) * 2

    assert torch.equal(torch.compile(model, fullgraph=True)(query), model(query))


def test_fake_tensors() -> None:
    arguments = BATCH.arguments()
    with FakeTensorMode() as mode:
        arguments = {k: mode.from_tensor(x) if torch.is_tensor(x) else x for k, x in arguments.items()}
        output = attention_varlen(**arguments)
    assert output.shape == (*arguments["query"].shape[:2], BATCH.value_channels)


def test_autocast() -> None:
    arguments = BATCH.arguments()
    with torch.autocast("cpu", torch.bfloat16):
        got = attention_varlen(**arguments)
    assert got.dtype == torch.bfloat16
    assert largest_difference(got, attention_varlen(**arguments)) < 0.05


def test_gradients_are_refused() -> None:
    arguments = BATCH.arguments()
    arguments["query"].requires_grad_()
    with pytest.raises(ValueError, match="must not require gradients"):
        attention_varlen(**arguments)
    with torch.no_grad():
        attention_varlen(**arguments)


def changed(name: str, place: int, number: int) -> Any:
    """A change of one number in a tensor."""

    def change(arguments: dict[str, Any]) -> dict[str, Any]:
        tensor = arguments[name].clone()
        tensor.view(-1)[place] = number
        return {name: tensor}

    return change


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"query": torch.zeros(1, 4, 10, 16)},
            ValueError,
            r"query must have 3 dimensions \[rows, heads, channels\], not 4",
        ),
        (
            {"key": torch.zeros(9, 2, 16)},
            ValueError,
            r"key must have 4 dimensions \[blocks.*\] with a block_table, not 3",
        ),
        ({"block_table": None}, ValueError, r"key must have 3 dimensions \[rows.*\] without a block_table, not 4"),
        (
            {"value": torch.zeros(2, 16, 2, 16)},
            ValueError,
            r"value must have the blocks and the block size of key \(.*, not \(2, 16\)",
        ),
        ({"key": torch.zeros(9, 0, 2, 16)}, ValueError, "key must have blocks of at least 1 key, not of 0"),
        ({"query": torch.zeros(9, 3, 16)}, ValueError, "query must have a multiple of the heads of key"),
        ({"query": torch.zeros(9, 4, 16).half()}, TypeError, "key must have the dtype of query"),
        (
            {"key": torch.zeros(47, 16, 2, 16, dtype=torch.float8_e4m3fn)},
            TypeError,
            r"key must have the dtype of query \(float32\), not float8_e4m3fn",
        ),
        ({"out": torch.zeros(9, 4, 16)}, ValueError, r"out must be \[rows, .*\] \(288, 4, 24\), not \(9, 4, 16\)"),
        (
            {"out": torch.zeros(288, 4, 24).half()},
            TypeError,
            r"out must have the dtype of query \(float32\), not float16",
        ),
        (
            {"window_size": (-2, 0)},
            ValueError,
            r"window_size must be \(left, right\), each at least 0 or -1 .*, not \(-2, 0\)",
        ),
        ({"window_size": (1, 2, 3)}, ValueError, r"window_size must be .*, not \(1, 2, 3\)"),
        ({"softcap": -1.0}, ValueError, "softcap must be between 0"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be \[heads of query\] \(4,\), not \(3,\)"),
        ({"cu_seq_q": torch.zeros(8)}, TypeError, "cu_seq_q must be int32 or int64, not float32"),
        ({"cu_seq_q": torch.zeros(2, 4).int()}, ValueError, r"cu_seq_q must be \[requests \+ 1\], not \(2, 4\)"),
        ({"cu_seq_q": []}, ValueError, r"cu_seq_q must be \[requests \+ 1\], not \(0,\)"),
        ({"cu_seq_k": [0, 1]}, ValueError, r"cu_seq_k must be \[requests \+ 1\] \(8,\), not \(2,\)"),
        ({"seqused_k": [1, 1]}, ValueError, r"seqused_k must be \[requests\] \(7,\), not \(2,\)"),
        ({"seqused_k": None}, ValueError, "seqused_k must be a tensor, not None, with a block_table"),
        ({"block_table": torch.zeros(7, 9)}, TypeError, "block_table must be int32 or int64, not float32"),
        (
            {"block_table": torch.zeros(3, 9).int()},
            ValueError,
            r"block_table must be \[requests, blocks\] \(7, ..\), not \(3, 9\)",
        ),
        ({"max_q": 100}, ValueError, r"max_q must be at least what request 1 has \(200\), not 100"),
        ({"max_k": 300}, ValueError, r"max_k must be at least what request 4 has \(301\), not 300"),
        (changed("cu_seq_q", 0, 1), ValueError, "cu_seq_q must start with 0, not 1"),
        (changed("cu_seq_q", 2, 0), ValueError, "cu_seq_q must not decrease, but falls from 1 to 0 after request 1"),
        (changed("cu_seq_q", 7, 999), ValueError, r"cu_seq_q must end within the rows of query \(288\), not at 999"),
        (changed("seqused_k", 1, -1), ValueError, "seqused_k must be at least 0, not -1 for request 1"),
        (changed("seqused_k", 1, 999), ValueError, r"request 1 must have its keys within .* \(336\), not up to 999"),
        (
            changed("block_table", 0, -1),
            ValueError,
            r"block_table must name pages of key \(0 to \d+\), not -1 for request 0",
        ),
        (changed("block_table", 0, 999), ValueError, "block_table must name pages of key .*, not 999 for request 0"),
        ({"config": {"threshold": 1}}, TypeError, "config must be an S2OConfig or None"),
    ],
)
def test_bad_arguments(change: Any, error: type[Exception], message: str) -> None:
    arguments = BATCH.arguments()
    change = change(arguments) if callable(change) else change
    with pytest.raises(error, match=message) as raised:
        attention_varlen(**{**arguments, **change})
    assert "\n" not in str(raised.value)


def test_packed_lengths_are_checked() -> None:
    arguments = dataclasses.replace(BATCH, block_size=None, slack=9).arguments()
    for change, message in (
        ({"cu_seq_k": None}, "cu_seq_k must be a tensor, not None, without a block_table"),
        (changed("cu_seq_k", 3, 5)(arguments), "cu_seq_k must not decrease, but falls from .* to 5 after request 2"),
        (changed("cu_seq_k", 7, 9999)(arguments) | {"seqused_k": None}, "must have its keys within those"),
        (changed("seqused_k", 0, 100)(arguments), r"at most the keys packed for request 0 \(99\), not 100"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_varlen(**{**arguments, **change, "max_k": 10**6})


@pytest.mark.parametrize("min_length", [0, 10**6])
def test_autocast_around_an_exported_program_casts_nothing(min_length: int) -> None:
    """The operator that such a program calls is opaque: autocast took its part when it was traced."""

    class Model(torch.nn.Module):
        def forward(self, query: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
            config = S2OConfig(min_length=min_length)
            return attention_varlen(query, query, query, starts, starts, 256, 256, window_size=(-1, 0), config=config)

    inputs = torch.randn(256, 2, 16), torch.tensor([0, 256], dtype=torch.int32)
    program = torch.export.export(Model(), inputs).run_decompositions().module()
    want = program(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(program(*inputs), want)


@pytest.mark.gpu
@pytest.mark.parametrize("sunk", [False, True])
@pytest.mark.parametrize("block_size", [None, 16, 256])
@pytest.mark.parametrize("window_size", [(-1, 0), (-1, -1), (40, 0), (5, 9), (2**40, 2**40)])
def test_flash_attention(window_size: tuple[int, int], block_size: int | None, sunk: bool) -> None:
    """All dense requests in one call, without waiting for the GPU."""
    call = dataclasses.replace(BATCH, value_channels=16, block_size=block_size, window_size=window_size, sunk=sunk)
    arguments = call.arguments("cuda", torch.bfloat16)
    assert packed.can_attend_packed(*(arguments[name] for name in ("query", "key", "value")))
    attention_varlen(**arguments, config=S2OConfig(min_length=10**6))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = attention_varlen(**arguments, config=S2OConfig(min_length=10**6))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_rows(call, got, dense_of(call, "cuda", torch.bfloat16), 0.03)


@pytest.mark.gpu
def test_lengths_on_the_gpu_give_the_same() -> None:
    arguments = BATCH.arguments("cuda", torch.bfloat16)
    want = attention_varlen(**arguments)
    away = {name: arguments[name].cuda() for name in ("cu_seq_q", "seqused_k")}
    assert torch.equal(attention_varlen(**{**arguments, **away}), want)
