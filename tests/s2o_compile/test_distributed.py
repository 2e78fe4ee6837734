"""Models over two processes: tensor parallel, FSDP2, pipelines and Ulysses give what one process gives.

Two processes run all checks, as importing torch and transformers takes each of them seconds.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

import s2o_compile

from ..passes.capture import EXACT, Capture
from ..passes.models import VOCABULARY, tiny

if not distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)

RANKS = 2
CHECKS: dict[str, Callable[[Path], None]] = {}


def check(function: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run a function in both processes, with a folder that they share."""
    CHECKS[function.__name__] = function
    return function


def mesh(name: str = "tp") -> Any:
    return distributed.device_mesh.init_device_mesh("cpu", (RANKS,), mesh_dim_names=(name,))


def ids() -> torch.Tensor:
    return torch.arange(1, 65).repeat(2, 1) * torch.tensor([[1], [5]]) % VOCABULARY


def llama() -> Any:
    model = tiny("llama")
    model.set_attn_implementation("s2o")
    s2o_compile.configure(model, EXACT)
    return model


def logits(model: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(ids(), use_cache=False, **options).logits
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def logits_of_compiled(model: Any, config: s2o_compile.S2OConfig) -> torch.Tensor:
    """The logits of a model whose attention sites all become sparse in its graphs, which run without Inductor."""
    captured = Capture(config)
    found = logits(torch.compile(model, backend=captured))
    assert [decision.rewritten for decision in captured.decisions] == [True, True], captured.decisions
    return found


def assert_same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def saved(folder: Path) -> Path:
    """The tiny model on disk, written by the first process."""
    if distributed.get_rank() == 0:
        tiny("llama").save_pretrained(folder / "model")
    distributed.barrier()
    return folder / "model"


@check
def tensor_parallel_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    want = logits(llama())
    path = saved(folder)
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="s2o", distributed_config=plan).eval()
    s2o_compile.configure(model, EXACT)
    with s2o_compile.profile() as seen:
        assert_same(logits(model), want)
    assert len(seen.sites) == 2
    model.set_attn_implementation("sdpa")
    torch._dynamo.reset()
    assert_same(logits_of_compiled(model, EXACT), want)


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return s2o_compile.attention(query, key, value, True, config=EXACT)


class Layer(torch.nn.Module):
    """Attention of 4 heads over 2 between projections."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (torch.nn.Linear(32, width) for width in (32, 16, 16, 32))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = (projection(x).unflatten(-1, (-1, 8)).transpose(1, 2) for projection in (self.q, self.k, self.v))
        return self.o(attention(*heads).transpose(1, 2).flatten(2))


@check
def parallelize_module_with_dtensors(folder: Path) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    x, layer = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0)), Layer()
    want = layer(x)
    for local in (True, False):
        columns = ColwiseParallel(use_local_output=local)
        plan = dict.fromkeys("qkv", columns) | {"o": RowwiseParallel(input_layouts=Shard(-1))}
        model = parallelize_module(Layer(), mesh(), plan)
        assert_same(model(x), want)
        torch._dynamo.reset()
        assert_same(torch.compile(model, backend="aot_eager")(x), want)


@check
def operator_on_dtensors(folder: Path) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 100, 8, generator=generator) for heads in (4, 2, 2))
    config = s2o_compile.S2OConfig(min_length=0, threshold=0.01)
    want = s2o_compile.attention(query, key, value, True, config=config)
    for placement in (Shard(0), Shard(1), Replicate()):
        parts = [distribute_tensor(x, mesh(), [placement]) for x in (query, key, value)]
        got = s2o_compile.attention(*parts, True, config=config)
        assert got.placements == (placement,)
        assert torch.equal(got.full_tensor(), want)


@check
def fully_sharded(folder: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    want = logits(llama())
    model = llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh("dp"))
    fully_shard(model, mesh=mesh("dp"))
    with s2o_compile.profile() as seen:
        assert_same(logits(model), want)
    assert len(seen.sites) == 2


@check
def pipeline_of_transformers(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    want = logits(llama())
    config = DistributedConfig(pp_size=RANKS)
    model = AutoModelForCausalLM.from_pretrained(saved(folder), attn_implementation="s2o", distributed_config=config)
    s2o_compile.configure(model.eval(), EXACT)
    assert_same(logits(model), want)


@check
def calibration_under_tensor_parallel(folder: Path) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    path, config = saved(folder), s2o_compile.S2OConfig(ranking=EXACT.ranking)
    whole = AutoModelForCausalLM.from_pretrained(path).eval()
    file = folder / "calibration.json"
    if distributed.get_rank() == 0:
        s2o_compile.calibrate(whole, {"input_ids": ids(), "use_cache": False}, error_budget=1e-3, output=file,
                              config=config, progress=False)  # fmt: skip
    distributed.barrier()
    calibrated = s2o_compile.S2OConfig(calibration=file, min_length=0)
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="s2o", distributed_config=plan).eval()
    s2o_compile.configure(model, calibrated)
    whole.set_attn_implementation("s2o")
    s2o_compile.configure(whole, calibrated)
    torch.testing.assert_close(logits(model), logits(whole), rtol=0.1, atol=0.1)


def ulysses(attend: Callable[..., Any]) -> Callable[..., Any]:
    """An attention function over all positions and some heads, of one over some positions and all heads."""
    from torch.distributed.nn.functional import all_to_all

    def exchange(x: torch.Tensor, cut: int, joined: int) -> torch.Tensor:
        parts = [part.contiguous() for part in x.chunk(RANKS, cut)]
        return torch.cat(all_to_all([torch.empty_like(part) for part in parts], parts), joined)

    def attend_all(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        operands = (exchange(x, 1, 2) for x in (query, key, value))
        output, weights = attend(module, *operands, None, **options)  # DeepSpeed passes no mask.
        return exchange(output, 1, 2), weights

    return attend_all


@check
def sequences_by_ulysses(folder: Path) -> None:
    from transformers import AttentionInterface

    want, rank = logits(llama()), distributed.get_rank()
    registered = AttentionInterface()["s2o"]
    AttentionInterface.register("s2o", ulysses(registered))
    try:
        positions = torch.arange(64).expand(2, 64)
        own = slice(32 * rank, 32 * (rank + 1))
        with torch.no_grad():
            got = llama()(ids()[:, own], position_ids=positions[:, own], use_cache=False).logits
    finally:
        AttentionInterface.register("s2o", registered)
    assert_same(got, want[:, own])


def in_two_processes(rank: int, folder: Path) -> None:
    """Run all checks; the error has the traceback of each that failed."""
    limit = datetime.timedelta(seconds=120)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS, timeout=limit
    )
    failed = []
    for name, function in CHECKS.items():
        own = folder / name
        own.mkdir(exist_ok=True)
        torch._dynamo.reset()
        try:
            function(own)
        except BaseException:
            failed.append(f"{name}:\n{traceback.format_exc()}")
        distributed.barrier()
    distributed.destroy_process_group()
    assert not failed, "\n".join(failed)


def test_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(in_two_processes, (tmp_path,), nprocs=RANKS)
