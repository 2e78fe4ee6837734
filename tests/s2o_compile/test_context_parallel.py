"""Inside torch's ``context_parallel`` the operator refuses to attend each rank to its own tokens only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn import functional

import s2o_compile

from ..passes.capture import EXACT, Capture
from ..passes.models import VOCABULARY, tiny

pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="needs torch.distributed")

REFUSED = "cannot run inside torch's context_parallel.* pass mesh= .* use SDPA there"
SITE: dict[str, Any] = {"is_causal": True, **EXACT.arguments()}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Any]:
    """A mesh of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@contextmanager
def context_parallel(mesh: Any, *buffers: torch.Tensor, dim: int = 2) -> Iterator[None]:
    from torch.distributed.tensor.experimental import context_parallel as entered

    with torch.no_grad(), entered(mesh, buffers=list(buffers), buffer_seq_dims=[dim] * len(buffers)):
        yield


def query() -> torch.Tensor:
    return torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(0))


CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "operator": lambda x: torch.ops.s2o.attention(x, x, x, **SITE),
    "too short": lambda x: torch.ops.s2o.attention(x, x, x, is_causal=True),
    "one query": lambda x: torch.ops.s2o.attention(x[:, :, -1:], x, x, softcap=2.0),
    "with statistics": lambda x: s2o_compile.attention(x, x, x, True, config=EXACT, return_stats=True),
    "function": lambda x: s2o_compile.attention(x, x, x, True, config=EXACT),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_inside_are_refused(name: str, mesh: Any) -> None:
    x = query()
    want = CALLS[name](x)
    with context_parallel(mesh, x):
        with pytest.raises(RuntimeError, match=REFUSED):
            CALLS[name](x)
        with context_parallel(mesh, query()), pytest.raises(RuntimeError, match=REFUSED):
            CALLS[name](x)
    for one, another in zip(CALLS[name](x), want, strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize("inside", [False, True], ids=["compiled outside", "compiled inside"])
def test_compiled_calls_inside_are_refused(inside: bool, mesh: Any) -> None:
    x = query()
    compiled = torch.compile(CALLS["operator"], backend="aot_eager")
    if not inside:
        compiled(x)
    with context_parallel(mesh, x), pytest.raises(Exception, match=REFUSED):
        compiled(x)
    torch.testing.assert_close(compiled(x), CALLS["operator"](x))


def test_other_threads_are_inside_too(mesh: Any) -> None:
    errors: list[BaseException] = []

    def call() -> None:
        try:
            CALLS["operator"](query())
        except RuntimeError as error:
            errors.append(error)

    with context_parallel(mesh, query()):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_other_functions_in_the_place_of_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *args, **kwargs: sdpa(*args, **kwargs))
    CALLS["operator"](query())


def test_sequences_over_ranks_are_refused(mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    x = distribute_tensor(query(), mesh, [Shard(2)])
    with pytest.raises(ValueError, match="query must be whole, or sharded over the batch"):
        CALLS["operator"](x)


class Attention(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.s2o.attention(query, key, value, **SITE)


def test_modules_that_context_parallel_wraps_are_refused(mesh: Any) -> None:
    experimental = pytest.importorskip("torch.distributed.tensor.experimental._attention")
    from torch.distributed.tensor.parallel import parallelize_module

    style = experimental._ContextParallel(2, experimental._ContextParallel.AttentionType.SDPA)
    module = parallelize_module(Attention(), mesh, style)
    experimental._enable_context_parallel_dispatcher()
    try:
        with pytest.raises(ValueError, match="query must be whole, or sharded over the batch"):
            module(query(), query(), query())
        # As those that gather keys and values do.
        CALLS["operator"](query())
    finally:
        experimental._disable_context_parallel_dispatcher()


@pytest.mark.parametrize("dim", [1, 2], ids=["heads", "sequence"])
def test_sites_of_dtensors_stay_dense(dim: int, mesh: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.experimental import register_sharding

    # SDPA has rules on a GPU only.
    @register_sharding(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)
    def by_heads(*args: Any, **kwargs: Any) -> Any:
        heads = Shard(1)
        return [([heads, heads], [heads, heads, heads, *[None] * (len(args) - 3)])]

    x = distribute_tensor(query(), mesh, [Shard(dim)])
    captured = Capture()
    attend = torch.compile(lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True), backend=captured)
    with torch.no_grad():
        torch.testing.assert_close(attend(x).to_local(), CALLS["operator"](query()))
    assert "query is a DTensor" in captured.only().reason
    # As the wrapper of context_parallel makes them, which then runs a ring; a mesh changes nothing.
    over_ranks = s2o_compile.S2OBackend(EXACT)
    torch._dynamo.reset()
    attend = torch.compile(
        lambda x: functional.scaled_dot_product_attention(x, x, x, is_causal=True),
        backend=over_ranks, options={"mesh": mesh},
    )  # fmt: skip
    with torch.no_grad(), pytest.warns(UserWarning, match="query is a DTensor"):
        attend(x)
    assert not over_ranks.report.decisions[0].rewritten


def in_two_processes(rank: int, store: str) -> None:
    """What each of two processes asserts."""
    from s2o_compile.integrations.lazy_mask import LazyMask
    from s2o_compile.ops.visibility import Visibility

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = tiny("llama")
        model.set_attn_implementation("s2o")
        s2o_compile.configure(model, EXACT)
        ids = torch.arange(1, 65)[None] % VOCABULARY
        positions = torch.arange(64)[None]
        with torch.no_grad():
            want = model(ids).logits
        with context_parallel(distributed.device_mesh.init_device_mesh("cpu", (2,)), ids, positions, dim=1):
            assert ids.shape == (1, 32)
            with pytest.raises(RuntimeError, match=REFUSED):
                model(ids, position_ids=positions)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, want)
        sent = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) < 0.5
        mask = LazyMask(Visibility(is_causal=True), (1, 1, 6, 6), torch.device("cpu"))
        if rank == 0:
            mask.copy_(sent)
        distributed.broadcast(mask, 0)
        assert torch.equal(mask, sent)
    finally:
        distributed.destroy_process_group()


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(in_two_processes, (f"{tmp_path}/store",), nprocs=2)
