"""Sequences over several ranks: each gives its rows of what one process gives."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed
from torch._subclasses.fake_tensor import FakeTensorMode

import s2o_compile
from s2o_compile.ops import Ranking, S2OConfig, context
from s2o_compile.ops.layout import LAYOUTS, Block, blocks_of_rank, in_order
from s2o_compile.ops.process_group import Gathering
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from ..ranks import SECONDS, Ranks, device
from .drawing import Call, draw_call, draw_config

if not distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

RANKS = 4
SPARSE = S2OConfig(
    min_length=0, threshold=0.02, ranking=Ranking(rule="dropped", channels=None, radius=0.0, near_keys=0)
)
NAMES = ("key_padding", "query_documents", "key_documents")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(RANKS, tmp_path_factory.mktemp("ranks") / "store")
    yield found
    found.close()


@functools.cache
def group_of(count: int) -> Any:
    """The group of the first ranks; all of them ask for it at once."""
    return distributed.new_group(list(range(count)), timeout=datetime.timedelta(seconds=SECONDS))


def own_part(x: torch.Tensor, dim: int, rank: int, count: int, layout: str) -> torch.Tensor:
    """What a rank holds of a sequence."""
    if layout == "contiguous":
        return x.chunk(count, dim)[rank]
    blocks = x.chunk(2 * count, dim)
    return torch.cat([blocks[rank], blocks[2 * count - 1 - rank]], dim)


def own_call(
    call: Call, count: int, layout: str, return_stats: bool = False, dtype: torch.dtype = torch.float32
) -> Any:
    """What this rank computes of a call; an empty tuple where it has no part in it."""
    group, rank = group_of(count), distributed.get_rank()
    if rank >= count:
        return ()
    arguments = call.arguments(device())
    for name in NAMES:
        if arguments[name] is not None:
            arguments[name] = own_part(arguments[name], 1, rank, count, layout)
    own = [call.lay_out(own_part(x, 2, rank, count, layout)) for x in call.tensors(dtype, device())]
    options: dict[str, Any] = {"config": call.config, "mesh": group, "layout": layout, "return_stats": return_stats}
    result = s2o_compile.attention(*own, **arguments, **options)
    parts = result if return_stats else (result,)
    return tuple(part.double().cpu().numpy() for part in parts)


def whole_of(parts: list[Any], count: int, layout: str) -> list[torch.Tensor]:
    """The results of a sequence from those of its ranks, by position."""
    found = []
    for of_ranks in zip(*parts[:count], strict=True):
        stacked = torch.cat([torch.from_numpy(part).movedim(2, 0) for part in of_ranks])
        found.append(in_order(stacked, count, layout).movedim(0, 2))
    return found


def one_process(call: Call, dtype: torch.dtype = torch.float32, on: str = "cpu") -> list[torch.Tensor]:
    tensors, arguments = call.tensors(dtype, on), call.arguments(on)
    result = s2o_compile.attention(*tensors, **arguments, config=call.config, return_stats=True)
    return [part.double().cpu() for part in result]


def comparable(call: Call) -> Call:
    """The same without draws where segments lie before position 0, which draw as those from there on."""
    if not call.visibility().effective_config(call.config).has_samples or call.offset >= 0:
        return call
    return dataclasses.replace(call, config=call.config.with_ranking(rule="dropped"))


@st.composite
def calls(draw: st.DrawFn, thresholds: tuple[float, ...]) -> tuple[Call, int, str]:
    """Calls of a whole sequence, and over how many ranks and how it is sharded."""

    def choose(options: Any) -> Any:
        return draw(st.sampled_from(options))

    count, layout, config = choose([2, RANKS]), choose(LAYOUTS), draw_config(choose, thresholds)
    step = 2 * count * (config.ranking.segment if config.threshold else 1)
    length, offset = step * choose(range(1, max(2, 400 // step))), choose([0, 0, -10, 50])
    call = draw_call(choose, 1, config)
    call = dataclasses.replace(call, queries=length, keys=length, offset=offset, mask=None, workspace=2**30)
    return comparable(call) if config.threshold else call, count, layout


@settings(max_examples=examples(25))
@given(calls((0.0,)))
def test_without_a_threshold_any_length(ranks: Ranks, drawn: tuple[Call, int, str]) -> None:
    call, count, layout = drawn
    got = whole_of(ranks.call(own_call, call, count, layout), count, layout)
    torch.testing.assert_close(got[0], one_process(call)[0], rtol=1e-6, atol=2e-6)


@settings(max_examples=examples(60))
@given(calls((1e-3, 1e-2, 5e-2)))
def test_the_same_keys_where_blocks_are_whole_segments(ranks: Ranks, drawn: tuple[Call, int, str]) -> None:
    call, count, layout = drawn
    got = whole_of(ranks.call(own_call, call, count, layout, True), count, layout)
    for one, another in zip(got, one_process(call), strict=True):
        same = (one - another).abs() <= 1e-5 * (1 + another.abs())
        same |= one == another  # Of rows that see nothing, the log-sum-exp is -inf.
        # The rounding of a key at the edge of the selection may change the rows of a segment.
        assert same.double().mean() >= 0.7


CAUSAL = Call(
    batch=2, groups=2, group=2, queries=256, keys=256, channels=16, value_channels=40, is_causal=True, offset=0,
    padded=True, window=None, documents=0, mask=None, softcap=0.0, sunk=True, layout="heads last", seed=0,
    workspace=2**30, config=SPARSE,
)  # fmt: skip


RULES = {
    "sampled": Ranking(channels=8, merge_length=0),
    "dropped": Ranking(rule="dropped", channels=8, pool=2),
    "means": Ranking(rule="means", channels=5, merge_length=0, lists="head"),
    "gain": Ranking(rule="gain", channels=None, merge_length=0, lists="head", segment=16),
    "output": Ranking(measure="output", channels=12, guides="kv_head"),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rules(layout: str, rule: str, ranks: Ranks) -> None:
    call = dataclasses.replace(CAUSAL, config=S2OConfig(threshold=0.02, min_length=0, ranking=RULES[rule]))
    got = whole_of(ranks.call(own_call, call, RANKS, layout, True), RANKS, layout)
    for one, another in zip(got, one_process(call), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dtypes(layout: str, dtype: torch.dtype, ranks: Ranks) -> None:
    got = whole_of(ranks.call(own_call, CAUSAL, RANKS, layout, False, dtype), RANKS, layout)
    torch.testing.assert_close(got[0], one_process(CAUSAL, dtype)[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("last", [0, 40, 100, 10**6])
@pytest.mark.parametrize("min_length", [0, 200, 257, None])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_sparse_is_chosen_by_the_whole_sequence(
    layout: str, min_length: int | None, last: int, ranks: Ranks
) -> None:
    call = dataclasses.replace(CAUSAL, config=dataclasses.replace(SPARSE, min_length=min_length, last_queries=last))
    got = whole_of(ranks.call(own_call, call, RANKS, layout, True), RANKS, layout)
    for one, another in zip(got, one_process(call), strict=True):
        torch.testing.assert_close(one, another, rtol=1e-5, atol=1e-5)


def test_what_one_rank_alone_is_given(ranks: Ranks) -> None:
    for layout in LAYOUTS:
        got = whole_of(ranks.call(own_call, CAUSAL, 1, layout, True), 1, layout)
        for one, another in zip(got, one_process(CAUSAL), strict=True):
            assert torch.equal(one, another)


DEFAULT = dataclasses.replace(
    CAUSAL, batch=1, group=3, padded=False, sunk=False, channels=128, queries=2048, keys=2048,
    config=S2OConfig(min_length=0, ranking=Ranking(merge_length=0)),
)  # fmt: skip
"""Of 6,144 queries of a KV head every third chooses channels, which ranks and blocks do not begin with."""


def ranked(threshold: float = 0.02, **fields: Any) -> S2OConfig:
    return S2OConfig(min_length=0, threshold=threshold, ranking=Ranking(merge_length=0, **fields))


AS_ONE_PROCESS: dict[str, dict[str, Any]] = {
    "default": {},
    "merged": {"config": ranked(channels=None, radius=4.0)},
    "merged from so many keys on": {"config": S2OConfig(min_length=0, ranking=Ranking(merge_length=2000, radius=4.0))},
    "merged but for a window": {"groups": 1, "window": 1200, "config": ranked(radius=4.0)},
    "padding": {"padded": True, "batch": 2, "groups": 1},
    "bidirectional": {"is_causal": False, "queries": 1024, "keys": 1024},
    "offset": {"offset": 96, "groups": 1},
    "outputs": {"groups": 1, "config": ranked(0.2, measure="output")},
    "outputs in documents": {"groups": 1, "documents": 3, "config": ranked(0.2, measure="output", channels=None)},
}


@pytest.mark.parametrize("name", AS_ONE_PROCESS)
def test_bits_are_those_of_one_process(name: str, ranks: Ranks) -> None:
    call = dataclasses.replace(DEFAULT, **AS_ONE_PROCESS[name])
    want = one_process(call)
    for count, layout in ((2, "head-tail"), (RANKS, "head-tail"), (RANKS, "contiguous")):
        got = whole_of(ranks.call(own_call, call, count, layout, True), count, layout)
        assert all(torch.equal(one, another) for one, another in zip(got, want, strict=True))


def call_of(lengths: list[int], documents: bool = False, **options: Any) -> int:
    """Attend so many positions on each rank, which may hold documents where others hold none; how many."""
    rank = distributed.get_rank()
    x = torch.ones(1, 2, lengths[rank], 8, device=device())
    ids = torch.zeros(1, lengths[rank], dtype=torch.int64, device=device()) if documents and rank == 1 else None
    arguments = {
        "query_documents": ids,
        "key_documents": ids,
        "config": SPARSE,
        "mesh": group_of(len(lengths)),
    } | options
    return s2o_compile.attention(x, x, x, True, **arguments).shape[2]


def test_parts_of_other_lengths_are_refused_by_all(ranks: Ranks) -> None:
    for layout in LAYOUTS:
        for lengths in ([32] * 4, [32, 32, 32, 30], [32] * 4, [30, 32, 34, 36], [0] * 4, [0, 0, 2, 0], [16] * 4):
            answers = ranks.answers(call_of_layout, lengths, layout)
            if len(set(lengths)) == 1:
                assert answers == lengths
                continue
            other = next(rank for rank, length in enumerate(lengths) if length != lengths[0])
            for answer in answers:
                assert str(answer).splitlines()[0] == (
                    f"ValueError: the length of key must be the same on all ranks of a group, not {lengths[0]} on rank "
                    f"0 and {lengths[other]} on rank {other}: pad the sequence, so that it divides evenly"
                )


def call_of_layout(lengths: list[int], layout: str) -> int:
    return call_of(lengths, layout=layout)


def call_with_documents() -> int:
    return call_of([32] * 4, documents=True)


def call_of_odd_length() -> int:
    return call_of([33] * 4)


def call_with_settings_of_a_rank() -> int:
    channels = 4 if distributed.get_rank() == 1 else None
    return call_of([32] * 4, config=SPARSE.with_ranking(channels=channels))


WHERE_ONE_RANK_DIFFERS: dict[str, dict[str, Any]] = {
    "whether key is bfloat16": {"dtypes": (torch.float16, torch.bfloat16)},
    "whether layout is 'head-tail'": {"layouts": ("head-tail", "contiguous")},
    "whether ranking.guides is 'head'": {"rankings": ({"guides": "head"}, {"guides": "kv_head"}), "heads": 2},
    "ranking.pool": {"rankings": ({"pool": 1}, {"pool": 2}), "length": 1024},
}
"""What would be read as another rank's, or sums of other sizes; of 4,096 queries as many are sampled as of 2,048."""


def call_where_one_rank_differs(name: str) -> None:
    given, differs = WHERE_ONE_RANK_DIFFERS[name], int(distributed.get_rank() == 1)
    x = torch.ones(1, 1, given.get("length", 32), 8, dtype=given.get("dtypes", (torch.float32,) * 2)[differs])
    config = SPARSE.with_ranking(channels=4, **given.get("rankings", ({}, {}))[differs])
    layout = given.get("layouts", LAYOUTS[:1] * 2)[differs]
    query = x.expand(-1, given.get("heads", 1), -1, -1)
    s2o_compile.attention(query, x, x, True, config=config, mesh=group_of(RANKS), layout=layout)


@pytest.mark.parametrize("name", WHERE_ONE_RANK_DIFFERS)
def test_what_one_rank_does_otherwise_is_refused_by_all(name: str, ranks: Ranks) -> None:
    for answer in ranks.answers(call_where_one_rank_differs, name):
        refusal = f"ValueError: {name} must be the same on all ranks of a group, not . on rank 0 and . on rank 1"
        assert re.fullmatch(refusal, str(answer).splitlines()[0]), answer


def call_with(name: str) -> int:
    group = group_of(RANKS)
    x, longer = torch.ones(1, 2, 32, 8), torch.ones(1, 2, 64, 8)
    key = longer if name == "cache" else x
    mask = torch.ones(32, 32, dtype=torch.bool) if name == "mask" else None
    options: dict[str, Any] = {"layout": "striped"} if name == "layout" else {}
    mesh: Any = group
    if name == "mesh":
        mesh = "0"
    if name == "dimensions":
        mesh = distributed.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    if name == "DTensor":
        from torch.distributed.tensor import DTensor, Shard

        x = key = DTensor.from_local(x, distributed.device_mesh.init_device_mesh("cpu", (RANKS,)), [Shard(2)])
    if name == "gradient":
        x = x.requires_grad_()
    if name == "name":
        return torch.ops.s2o.attention_context(x, x, x, group="no group").shape[2]
    return s2o_compile.attention(x, key, key, True, mask=mask, config=SPARSE, mesh=mesh, **options).shape[2]


REFUSED = {
    "cache": "ValueError: key must have the length of query [(]32[)] where the sequence is sharded over ranks, not 64",
    "mask": "ValueError: mask must be None where the sequence is sharded over ranks: is_causal, window",
    "layout": "ValueError: layout must be 'head-tail' or 'contiguous', not 'striped'",
    "mesh": "TypeError: mesh must be a DeviceMesh or a ProcessGroup, not '0'",
    "dimensions": 'ValueError: mesh must have one dimension, .* not 2: take it by name, as in mesh."cp".',
    "DTensor": "TypeError: query must be a plain tensor, not a DTensor: call this on the parts",
    "gradient": "ValueError: query, key, value and sinks must not require gradients",
    "name": "ValueError: group must be the name of a process group of this process, not 'no group'",
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_are_refused(name: str, ranks: Ranks) -> None:
    for answer in ranks.answers(call_with, name):
        assert re.match(REFUSED[name], str(answer)), answer


def test_other_calls_that_all_ranks_refuse(ranks: Ranks) -> None:
    for answer in ranks.answers(call_with_documents):
        assert re.match("ValueError: the size in bytes of an element of key_documents must be the same", str(answer))
    for answer in ranks.answers(call_with_settings_of_a_rank):
        assert re.match("ValueError: the number of queries by which channels are chosen must be the same", str(answer))
    for answer in ranks.answers(call_of_odd_length):
        assert re.match("ValueError: query must have an even length with layout='head-tail', not 33", str(answer))


def attend_until_a_rank_ends(ends: int, folder: Path) -> None:
    """End as a program would that does not expect errors."""
    if distributed.get_rank() == ends:
        os._exit(0)
    try:
        call_of([32] * distributed.get_world_size())
    except RuntimeError as error:
        (folder / str(distributed.get_rank())).write_text(str(error))
        os._exit(1)


def test_a_rank_that_ends_is_an_error_of_the_others(tmp_path: Path) -> None:
    ranks = Ranks(3, tmp_path / "store")
    try:
        ranks.call(call_of, [32] * 3)
        ranks.start(attend_until_a_rank_ends, 1, tmp_path)
        for process in ranks.processes:
            process.join(30)
        assert [process.exitcode for process in ranks.processes] == [1, 0, 1]
        for rank in (0, 2):
            assert "peer" in (tmp_path / str(rank)).read_text()
    finally:
        ranks.close()


def compiled_calls() -> tuple[list[str], float]:
    """The graphs of calls of several lengths, and how far their results are from those of eager calls."""
    torch._dynamo.reset()
    graphs: list[str] = []
    group, rank = group_of(RANKS), distributed.get_rank()

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(module.graph))
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return s2o_compile.attention(query, key, value, True, config=SPARSE, mesh=group)

    compiled, worst = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True), 0.0
    for length in (64, 96, 130):
        tensors = [torch.randn(1, heads, length, 8) + rank for heads in (4, 2, 2)]
        got, want = compiled(*tensors), attend(*tensors)
        assert got.stride() == want.stride()
        worst = max(worst, float((got - want).abs().max()))
    return graphs, worst


def test_graphs_are_the_same_on_all_ranks(ranks: Ranks) -> None:
    answers = ranks.call(compiled_calls)
    assert all(worst == 0 for _, worst in answers)
    first = answers[0][0]
    assert len(first) < 3, "one for each length"
    assert all(graphs == first for graphs, _ in answers)


def shapes_of_results(count: int, layout: str, length: int) -> list[list[list[int]]]:
    """The shapes of the results of a call, and of the same on tensors without memory; none where a rank has no part."""
    group = group_of(count)
    if distributed.get_rank() >= count:
        return []
    tensors = [torch.randn(1, heads, length, 8) for heads in (2, 1, 1)]
    arguments = (*(True, 0, None, None, None, None, None, 0.0, None, ""), group.group_name, layout, SPARSE.as_json)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in tensors]
        expected = torch.ops.s2o.context_stats(*fakes, *arguments)
    return [[list(x.shape) for x in each] for each in (torch.ops.s2o.context_stats(*tensors, *arguments), expected)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [1, 2, RANKS])
def test_shapes_are_known_before(count: int, layout: str, ranks: Ranks) -> None:
    tile = SPARSE.ranking.tile
    for length in (tile, 2 * tile, 3 * tile - 2, 4 * tile):
        for got, want in ranks.call(shapes_of_results, count, layout, length)[:count]:
            assert got == want


def cast_by_autocast() -> str:
    x = torch.ones(1, 2, 32, 8)
    with torch.autocast("cpu", torch.bfloat16):
        return str(s2o_compile.attention(x, x, x, True, config=SPARSE, mesh=group_of(RANKS)).dtype)


def test_autocast(ranks: Ranks) -> None:
    assert ranks.call(cast_by_autocast) == ["torch.bfloat16"] * RANKS


def inside_autocast_and_outside() -> list[tuple[str, float]]:
    """Dtypes of what graphs that were traced outside call, and how far they are from what they are there."""
    tensors = [torch.randn(1, heads, 64, 8) for heads in (2, 1, 1)]
    terms = (True, 0, None, None, None, None, None, 0.0, None)
    arguments = (*tensors, *terms, "", group_of(RANKS).group_name, "head-tail", SPARSE.as_json)
    found = []
    for attend in (torch.ops.s2o.context, lambda *given: torch.ops.s2o.context_stats(*given)[0]):
        want = attend(*arguments)
        with torch.autocast("cpu", torch.bfloat16):
            got = attend(*arguments)
        found.append((str(got.dtype), float((got - want).abs().max())))
    return found


def test_autocast_casts_no_values_that_still_travel(ranks: Ranks) -> None:
    assert ranks.call(inside_autocast_and_outside) == [[("torch.float32", 0.0)] * 2] * RANKS


def test_values_that_did_not_arrive_are_awaited_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that memory did not suffice for is repeated, and must not read what was never filled."""

    waits = [Mock(), Mock(side_effect=[torch.OutOfMemoryError("no room"), None])]
    monkeypatch.setattr(context, "start_gathering", lambda x, _: Gathering(torch.cat([x, x]), waits.pop(0)))
    key, value = torch.randn(2, 1, 1, 4, 8)
    whole = context.Whole.gathered(key, value, Visibility(), Mock(size=lambda: 2), "head-tail")
    with pytest.raises(torch.OutOfMemoryError):
        whole.arrive()
    whole.arrive()
    assert torch.equal(whole.value, value[:, :, [0, 1, 0, 1, 2, 3, 2, 3]])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_layouts(count: int) -> None:
    length = 12
    for layout in LAYOUTS:
        held = []
        for rank in range(count):
            blocks = blocks_of_rank(rank, count, length, layout, 2)
            assert [block.row for block in blocks] == [sum(x.length for x in blocks[:i]) for i in range(len(blocks))]
            held += [position + i for _, position, size in blocks for i in range(size)]
        assert sorted(held) == list(range(count * length))
        ordered = in_order(torch.tensor(held)[:, None], count, layout)
        assert ordered.flatten().tolist() == list(range(count * length))
        for rank in range(count):
            part = own_part(torch.arange(count * length), 0, rank, count, layout)
            assert held[rank * length : (rank + 1) * length] == part.tolist()


def test_neighbouring_blocks_are_one_where_no_segment_is_torn() -> None:
    assert blocks_of_rank(3, 4, 64, "head-tail", 32) == [Block(0, 96, 64)]
    assert blocks_of_rank(3, 4, 32, "head-tail", 32) == [Block(0, 48, 16), Block(16, 64, 16)]
    assert blocks_of_rank(0, 1, 30, "head-tail", 32) == [Block(0, 0, 30)]


def test_nothing_of_distributed_tensors_is_imported() -> None:
    program = """
import sys, torch
before = {name for name in sys.modules if name.startswith("torch.distributed")}
import s2o_compile
x = torch.ones(1, 1, 64, 8)
s2o_compile.attention(x, x, x, True, config=s2o_compile.S2OConfig(min_length=0))
after = {name for name in sys.modules if name.startswith("torch.distributed")}
assert after == before, after - before
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    found = Ranks(2, tmp_path_factory.mktemp("gpus") / "store", "nccl")
    yield found
    found.close()


ON_GPUS = dataclasses.replace(CAUSAL, queries=4096, keys=4096, channels=64, value_channels=64)


GPU_CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "bidirectional": {"is_causal": False},
    "window": {"window": 700},
    "documents": {"documents": 3},
    "soft cap": {"softcap": 20.0},
    "plain": {"sunk": False, "padded": False},
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GPU_CALLS)
@pytest.mark.parametrize("threshold", [0.0, 0.02])
def test_two_gpus(threshold: float, name: str, layout: str, dtype: torch.dtype, gpus: Ranks) -> None:
    if dtype == torch.float32 and name != "causal":
        pytest.skip("one call in float32 is enough")
    config = dataclasses.replace(SPARSE, threshold=threshold)
    call = dataclasses.replace(ON_GPUS, config=config, **GPU_CALLS[name])
    got = whole_of(gpus.call(own_call, call, 2, layout, True, dtype), 2, layout)
    want = one_process(call, dtype, "cuda")
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    for one, another in zip(got[:2], want[:2], strict=True):
        # Where ranks are cut, blocks of the kernels are others, and a few keys at the edge of the selection.
        close = ((one - another).abs() <= tolerance * (1 + another.abs())) | (one == another)
        assert close.double().mean() > (0.999 if threshold else 1 - 1e-6)
    torch.testing.assert_close(got[2].sum(), want[2].sum(), rtol=1e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", AS_ONE_PROCESS)
def test_two_gpus_choose_as_one(name: str, layout: str, gpus: Ranks) -> None:
    call = dataclasses.replace(DEFAULT, **AS_ONE_PROCESS[name])
    got = whole_of(gpus.call(own_call, call, 2, layout, True, torch.bfloat16), 2, layout)
    want = one_process(call, torch.bfloat16, "cuda")
    for one, another in zip(got[:2], want[:2], strict=True):
        close = ((one - another).abs() <= 2e-2 * (1 + another.abs())) | (one == another)
        assert close.double().mean() > 0.999
    torch.testing.assert_close(got[2].sum(), want[2].sum(), rtol=1e-4, atol=0)


@pytest.mark.gpu
def test_two_gpus_that_run_dense(gpus: Ranks) -> None:
    call = dataclasses.replace(ON_GPUS, config=S2OConfig(min_length=2**62))
    for layout in LAYOUTS:
        got = whole_of(gpus.call(own_call, call, 2, layout, False, torch.bfloat16), 2, layout)
        want = one_process(call, torch.bfloat16, "cuda")
        torch.testing.assert_close(got[0], want[0], rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_two_gpus_with_parts_of_other_lengths(gpus: Ranks) -> None:
    for lengths in ([32, 32], [64, 66], [64, 64]):
        for answer, length in zip(gpus.answers(call_of, lengths), lengths, strict=True):
            if lengths[0] == lengths[1]:
                assert answer == length
            else:
                assert re.match("ValueError: the length of key must be the same on all ranks", str(answer))


@pytest.mark.gpu
def test_a_gpu_that_ends_is_an_error_of_the_other(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = Ranks(2, tmp_path / "store", "nccl")
    try:
        ranks.call(call_of, [32] * 2)
        ranks.start(attend_on_gpus_until_one_ends)
        for process in ranks.processes:
            process.join(6 * SECONDS)
        assert ranks.processes[1].exitcode == 0 and ranks.processes[0].exitcode not in (0, None)
    finally:
        ranks.close()


def attend_on_gpus_until_one_ends() -> None:
    """End without a word on rank 1; on rank 0 with an error, or by NCCL's watchdog after its timeout."""
    if distributed.get_rank() == 1:
        os._exit(0)
    try:
        call_of([32] * 2)
        torch.cuda.synchronize()
    except RuntimeError:
        os._exit(1)
    os._exit(0)


def attend_on_gpus_what_differs_on_one(folder: Path) -> None:
    rank = distributed.get_rank()
    try:
        call_of([64, 64])
        call_of([64, 66])
        torch.cuda.synchronize()
    except (RuntimeError, ValueError) as error:
        (folder / str(rank)).write_text(str(error))
        os._exit(1)
    os._exit(0)


@pytest.mark.gpu
def test_a_gpu_whose_length_is_new_is_an_error_of_both(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks = Ranks(2, tmp_path / "store", "nccl")
    try:
        ranks.start(attend_on_gpus_what_differs_on_one, tmp_path)
        for process in ranks.processes:
            process.join(6 * SECONDS)
        assert all(process.exitcode not in (0, None) for process in ranks.processes)
        assert "the length of key must be the same on all ranks" in (tmp_path / "1").read_text()
    finally:
        ranks.close()
