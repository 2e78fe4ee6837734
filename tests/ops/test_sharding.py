"""Calls of DTensors: each rank attends to its own batch entries and heads, to what a call of all of them would give.

Ranks are simulated: nothing is sent, and the parts of a tensor are those that torch gives a rank of a mesh.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import distributed

import s2o_compile
from s2o_compile.ops import AttentionResult, S2OConfig

if not distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode, _clear_sharding_prop_cache
from torch.distributed.tensor.experimental import implicit_replication
from torch.testing._internal.distributed.fake_pg import FakeStore

BATCH, HEADS, SEQUENCE, WHOLE = Shard(0), Shard(1), Shard(2), Replicate()
SPARSE = S2OConfig(min_length=0, threshold=0.01)
DENSE = S2OConfig(min_length=2**62)

Tensors = dict[str, torch.Tensor]


@pytest.fixture
def mesh_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., DeviceMesh]]:
    """Makes a mesh of a shape, on which this process is one of the ranks."""

    def make(*shape: int, rank: int = 0) -> DeviceMesh:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        _clear_sharding_prop_cache()  # It holds meshes, with the rank that this process was.
        size = torch.Size(shape).numel()
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        return init_device_mesh("cpu", shape)

    yield make
    if distributed.is_initialized():
        distributed.destroy_process_group()
    torch._dynamo.reset()


def operands(batch: int = 2, heads: int = 8, kv_heads: int = 4, queries: int = 200, keys: int | None = None) -> Tensors:
    """Random query, key and value of 16 channels."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (heads, queries), "key": (kv_heads, keys or queries), "value": (kv_heads, keys or queries)}
    return {name: torch.randn(batch, *shape, 16, generator=generator) for name, shape in shapes.items()}


def random_mask(*shape: int) -> torch.Tensor:
    """A mask in which each query sees a key, as the diagonal is seen."""
    seen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    return seen | torch.eye(*shape[-2:], dtype=torch.bool)


DOCUMENTS = (torch.arange(200)[None] // torch.tensor([[64], [90]])).int()
TERMS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "bidirectional": {},
    "chunk": {"is_causal": True, "causal_offset": 100},
    "padding": {"is_causal": True, "key_padding": torch.arange(200)[None] >= torch.tensor([[0], [30]])},
    "documents": {"is_causal": True, "query_documents": DOCUMENTS, "key_documents": DOCUMENTS},
    "window": {"is_causal": True, "window": 50},
    "mask of all": {"mask": random_mask(200, 200)},
    "mask of entries": {"mask": random_mask(2, 1, 200, 200)},
    "mask of heads": {"mask": random_mask(8, 200, 200)},
    "mask of both": {"mask": random_mask(2, 8, 200, 200)},
    "soft cap": {"is_causal": True, "softcap": 5.0},
    "sinks": {"is_causal": True, "sinks": torch.linspace(-1, 3, 8)},
    "all but a mask": {
        "is_causal": True, "softcap": 5.0, "sinks": torch.linspace(-1, 3, 8), "window": 120,
        "key_padding": torch.arange(200)[None] >= torch.tensor([[0], [30]]), "scale": -0.3,
    },
}  # fmt: skip
PLACED: dict[str, tuple[tuple[int, ...], int, list[Placement]]] = {
    "heads": ((2,), 1, [HEADS]),
    "heads over 4": ((4,), 2, [HEADS]),
    "batch": ((2,), 1, [BATCH]),
    "whole": ((2,), 1, [WHOLE]),
    "batch and heads": ((2, 4), 6, [BATCH, HEADS]),
    "heads and batch": ((2, 2), 1, [HEADS, BATCH]),
    "heads twice": ((2, 2), 3, [HEADS, HEADS]),
    "heads, the rest whole": ((2, 2), 2, [HEADS, WHOLE]),
}
LIKE_QUERY = {"query": (0, 1), "key": (0, 1), "value": (0, 1), "key_padding": (0,), "mask": (-4, -3),
              "query_documents": (0,), "key_documents": (0,), "sinks": (None, 0)}  # fmt: skip


def part(tensor: torch.Tensor, placements: list[Placement], mesh: DeviceMesh) -> torch.Tensor:
    """This rank's part of a tensor that divides evenly."""
    for index, placement in enumerate(placements):
        if isinstance(placement, Shard):
            tensor = tensor.chunk(mesh.size(index), placement.dim)[mesh.get_local_rank(index)]
    return tensor


def placed(tensor: torch.Tensor, placements: list[Placement], mesh: DeviceMesh) -> DTensor:
    local = part(tensor, placements, mesh).contiguous()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.contiguous().stride()
    )


def like_query(name: str, tensor: torch.Tensor, placements: list[Placement]) -> list[Placement]:
    """How a tensor is sharded along with the query."""
    found: list[Placement] = []
    for placement in placements:
        dims = LIKE_QUERY[name] + (None,) * 2
        own = dims[placement.dim] if isinstance(placement, Shard) else None
        if own is not None and own < 0:
            own = own % tensor.dim() if -own <= tensor.dim() and tensor.shape[own] != 1 else None
        found.append(WHOLE if own is None else Shard(own))
    return found


def distributed_call(
    call: Callable[..., Any],
    tensors: Tensors,
    placements: list[Placement],
    mesh: DeviceMesh,
    cut: bool,
    compiled: bool = False,
    **options: Any,
) -> Any:
    """What a call of DTensors gives, which sends nothing; `cut` says whether terms are sharded along with the query."""
    own = {
        name: placed(
            tensor, like_query(name, tensor, placements) if cut or name == "query" else [WHOLE] * mesh.ndim, mesh
        )
        for name, tensor in tensors.items()
    }
    sent = CommDebugMode()
    with torch.no_grad(), contextlib.nullcontext() if compiled else sent:  # Nothing is compiled inside of the mode.
        result = call(**own, **options)
    assert not sent.comm_counts
    return result


def assert_part(got: Any, want: torch.Tensor, placements: list[Placement], mesh: DeviceMesh) -> None:
    assert isinstance(got, DTensor) and list(got.placements) == placements and got.shape == want.shape
    torch.testing.assert_close(got.to_local(), part(want, placements, mesh), rtol=0, atol=0)


@pytest.mark.parametrize("place", PLACED)
@pytest.mark.parametrize("terms", TERMS)
def test_each_rank_has_its_part_of_one_call(terms: str, place: str, mesh_of: Callable[..., DeviceMesh]) -> None:
    shape, rank, placements = PLACED[place]
    mesh = mesh_of(*shape, rank=rank)
    tensors = operands(queries=100 if terms == "chunk" else 200, keys=200)
    options = {name: term for name, term in TERMS[terms].items() if not isinstance(term, torch.Tensor)}
    tensors |= {name: term for name, term in TERMS[terms].items() if isinstance(term, torch.Tensor)}
    want = s2o_compile.attention(**tensors, **options, config=SPARSE, return_stats=True)
    for cut in (True, False):
        call = {"config": SPARSE, "return_stats": True}
        got = distributed_call(s2o_compile.attention, tensors, placements, mesh, cut, **options, **call)
        for one, another in zip(got, want, strict=True):
            assert_part(one, another, placements, mesh)
    dense = s2o_compile.attention(**tensors, **options, config=DENSE)
    got = distributed_call(s2o_compile.attention, tensors, placements, mesh, True, **options, config=DENSE)
    assert list(got.placements) == placements
    torch.testing.assert_close(got.to_local(), part(dense, placements, mesh), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("config", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_one_kv_head_is_whole_on_each_rank(config: S2OConfig, mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh = mesh_of(4, rank=3)
    tensors = operands(kv_heads=1)
    got = distributed_call(s2o_compile.attention, tensors, [HEADS], mesh, False, is_causal=True, config=config)
    local = tensors | {"query": part(tensors["query"], [HEADS], mesh)}
    want = s2o_compile.attention(**local, is_causal=True, config=config)
    assert got.placements == (HEADS,)
    torch.testing.assert_close(got.to_local(), want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_ranks_without_batch_entries(rank: int, mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh = mesh_of(3, rank=rank)
    for config in (SPARSE, DENSE):
        tensors = operands()
        own = {
            name: DTensor.from_local(
                x[rank : rank + 1], mesh, [BATCH], run_check=False, shape=x.shape, stride=x.stride()
            )
            for name, x in tensors.items()
        }
        got = s2o_compile.attention(**own, is_causal=True, config=config)
        want = s2o_compile.attention(**tensors, is_causal=True, config=config)[rank : rank + 1]
        torch.testing.assert_close(got.to_local(), want, rtol=1e-5, atol=2e-6)


def test_in_inference_mode(mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh, tensors = mesh_of(2), operands()
    want = s2o_compile.attention(**tensors, is_causal=True, config=SPARSE)
    with torch.inference_mode():
        got = distributed_call(torch.ops.s2o.attention, tensors, [HEADS], mesh, True, is_causal=True,
                               **SPARSE.arguments())  # fmt: skip
        assert_part(got, want, [HEADS], mesh)


@pytest.mark.parametrize(
    ("place", "min_length"),
    [
        pytest.param("heads", 0, id="heads, sparse"),
        pytest.param("heads", 400, id="heads, chosen at run time"),
        pytest.param("batch and heads", 0, id="batch and heads, sparse", marks=pytest.mark.slow),
        pytest.param("batch and heads", 400, id="batch and heads, chosen at run time"),
    ],
)
def test_compiled_for_many_lengths(place: str, min_length: int, mesh_of: Callable[..., DeviceMesh]) -> None:
    shape, rank, placements = PLACED[place]
    mesh, graphs = mesh_of(*shape, rank=rank), 0
    config = S2OConfig(min_length=min_length, threshold=0.01)

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
        offset = key.shape[2] - query.shape[2]
        return s2o_compile.attention(query, key, value, True, offset, sinks=sinks, config=config)

    compiled = torch.compile(attend, backend=backend, dynamic=True, fullgraph=True)
    for queries in (512, 384, 320):
        tensors = operands(queries=queries, keys=queries + 64) | {"sinks": torch.linspace(-1, 3, 8)}
        with torch.no_grad():
            want = attend(**tensors)
        got = distributed_call(compiled, tensors, placements, mesh, True, compiled=True)
        assert list(got.placements) == placements
        torch.testing.assert_close(got.to_local(), part(want, placements, mesh), rtol=1e-5, atol=2e-6)
    assert graphs < 3, "one for each length"


def test_what_is_worth_being_sparse_is_the_part_of_a_rank(mesh_of: Callable[..., DeviceMesh]) -> None:
    from s2o_compile.ops.distributed import local_shape

    mesh = mesh_of(2, 3)
    x = torch.empty(5, 6, 7, 8)
    assert local_shape(x) == x.shape
    tensor = DTensor.from_local(x[:3, :2], mesh, [BATCH, HEADS], run_check=False, shape=x.shape, stride=x.stride())
    assert local_shape(tensor) == (3, 2, 7, 8)


def all_placed(placements: list[Placement]) -> dict[str, list[Placement]]:
    return dict.fromkeys(("query", "key", "value"), placements)


REFUSED: dict[str, tuple[dict[str, Any], tuple[int, ...], str]] = {
    "sequence": (all_placed([SEQUENCE]), (2,), r"query must be whole, or .* not S\(2\)"),
    "channels": (all_placed([Shard(3)]), (2,), r"query must be whole, or .* not S\(3\)"),
    "sequence of keys": ({"query": [WHOLE], "key": [SEQUENCE], "value": [SEQUENCE]}, (2,), "key must be placed as"),
    "sequence of a query": ({"query": [SEQUENCE], "key": [WHOLE], "value": [WHOLE]}, (2,), "query must be whole"),
    "sums": (all_placed([Partial()]), (2,), "query must be whole"),
    "keys only": ({"query": [WHOLE], "key": [HEADS], "value": [HEADS]}, (2,), "key must be placed as"),
    "batch and heads": ({"query": [BATCH], "key": [HEADS], "value": [BATCH]}, (2,), "key must be placed as"),
    "heads of values": ({"query": [HEADS], "key": [HEADS], "value": [BATCH]}, (2,), "value must be placed as"),
    "few heads": (all_placed([HEADS]), (8,), "key must have a multiple of 8 heads"),
    "heads twice": (
        all_placed([HEADS, HEADS]), (2, 4), "key must have a multiple of 8 heads",
    ),
    "padding": ({"key_padding": [Shard(1)]}, (2,), "key_padding must be placed as"),
    "documents": ({"key_documents": [Shard(1)]}, (2,), "key_documents must be placed as"),
    "mask": ({"mask": [Shard(2)]}, (2,), "mask must be placed as"),
    "sinks": ({"sinks": [Shard(0)], "query": [BATCH]}, (2,), "sinks must be placed as"),
}  # fmt: skip


@pytest.mark.parametrize("call", ["sparse", "dense", "statistics", "compiled"])
@pytest.mark.parametrize("name", REFUSED)
def test_other_placements_are_refused(name: str, call: str, mesh_of: Callable[..., DeviceMesh]) -> None:
    placements, shape, sentence = REFUSED[name]
    mesh = mesh_of(*shape)
    tensors = operands(heads=16) | {
        "key_padding": torch.ones(2, 200, dtype=torch.bool), "query_documents": DOCUMENTS, "key_documents": DOCUMENTS,
        "mask": random_mask(2, 16, 200, 200), "sinks": torch.zeros(16),
    }  # fmt: skip
    tensors = {name: x for name, x in tensors.items() if name in {*placements, "query", "key", "value"}}
    if "key_documents" in tensors:
        tensors["query_documents"] = DOCUMENTS
    whole = [WHOLE] * mesh.ndim
    own = {name: placed(x, placements.get(name, whole), mesh) for name, x in tensors.items()}
    attend: Callable[..., Any] = s2o_compile.attention
    options = {"config": DENSE if call == "dense" else SPARSE, "return_stats": call == "statistics"}
    expected: type[Exception] = ValueError
    if call == "compiled":
        attend, expected = torch.compile(attend, backend="aot_eager"), Exception
    sent = CommDebugMode()
    mode = contextlib.nullcontext() if call == "compiled" else sent
    with torch.no_grad(), mode, pytest.raises(expected, match=sentence):
        attend(**own, **options)
    assert not sent.comm_counts


@pytest.mark.parametrize("heads", [12, 6])
def test_heads_that_divide_where_those_of_keys_do_not(heads: int, mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh = mesh_of(2)
    own = {
        name: DTensor.from_local(x.chunk(2, 1)[0], mesh, [HEADS], run_check=False, shape=x.shape, stride=x.stride())
        for name, x in operands(heads=heads, kv_heads=3).items()
    }
    with pytest.raises(ValueError, match=r"key must have a multiple of 2 heads, .* not 3"):
        s2o_compile.attention(**own, config=SPARSE)


def test_the_rules_of_inner_operators_refuse_too(mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh = mesh_of(2)
    own = {name: placed(x, [SEQUENCE], mesh) for name, x in operands().items()}
    terms = (True, 0, None, None, None, None)
    calls: dict[str, tuple[Any, ...]] = {
        "sparse": (*terms, None, 1.0, 0.0, "", SPARSE.as_json), "dense": (*terms, 1.0, 0.0, None),
        "attention_dynamic": (),
    }  # fmt: skip
    for name, rest in calls.items():
        with torch.no_grad(), pytest.raises(Exception, match="query must be whole"):
            getattr(torch.ops.s2o, name)(*own.values(), *rest)


def test_plain_tensors_beside_dtensors(mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh, tensors = mesh_of(2, rank=1), operands()
    own: dict[str, Any] = {name: placed(x, [HEADS], mesh) for name, x in tensors.items()}
    terms: dict[str, Any] = {"key_padding": TERMS["padding"]["key_padding"], "sinks": torch.linspace(-1, 3, 8)}
    want = s2o_compile.attention(**tensors, **terms, config=SPARSE)
    for mixed in (own | {"key": tensors["key"]}, own | {"query": tensors["query"]}, own | terms):
        with pytest.raises(TypeError, match=r"must be a DTensor, as .* is one"):
            s2o_compile.attention(**mixed, config=SPARSE)
    with torch.no_grad(), implicit_replication():
        assert_part(s2o_compile.attention(**own, **terms, config=SPARSE), want, [HEADS], mesh)


def test_other_meshes(mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh = mesh_of(2, 2)
    flat = init_device_mesh("cpu", (4,))
    own = {name: placed(x, [WHOLE] * 2, mesh) for name, x in operands().items()}
    own["value"] = placed(operands()["value"], [WHOLE], flat)
    with pytest.raises(ValueError, match="value must be on the mesh of query"):
        s2o_compile.attention(**own, config=SPARSE)


@pytest.mark.parametrize("first", ["s2o_compile", "torch.distributed.tensor"])
def test_registered_in_any_order_of_imports(first: str) -> None:
    code = f"""
import sys, {first}
if {first!r} == "s2o_compile":
    import torch
    assert "torch.distributed.tensor" not in sys.modules
import s2o_compile, torch.distributed.tensor as tensor
rules = tensor.DTensor._op_dispatcher.sharding_propagator.op_strategy_funcs
for name in ("attention_dynamic", "dense", "sparse"):
    assert getattr(torch.ops.s2o, name).default in rules, name
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning:s2o_compile", "-c", code], check=True)


def test_private_parts_of_torch_are_there() -> None:
    """What `ops.sharding` uses, which torch may move."""
    from torch.distributed.tensor import _dtensor_spec, _op_schema

    for module, names in {
        _dtensor_spec: ["DTensorSpec"],
        _op_schema: ["OpSchema", "OpSpec", "OpStrategy", "RuntimeSchemaInfo"],
        DTensor._op_dispatcher: ["_allow_implicit_replication"],
        DTensor._op_dispatcher.sharding_propagator: ["register_op_strategy"],
    }.items():
        for name in names:
            assert hasattr(module, name), f"torch moved {name}, which ops/sharding.py uses"


def test_statistics_are_a_result(mesh_of: Callable[..., DeviceMesh]) -> None:
    mesh = mesh_of(2)
    own = {name: placed(x, [HEADS], mesh) for name, x in operands().items()}
    with torch.no_grad():
        assert isinstance(s2o_compile.attention(**own, config=DENSE, return_stats=True), AttentionResult)
