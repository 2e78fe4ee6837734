"""Models whose sequence is sharded over ranks give what one process gives, by configure and by the backend.

Two processes run all checks, as importing torch and transformers takes each of them seconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.nn.functional import scaled_dot_product_attention

import s2o_compile
from s2o_compile.ops import Ranking, S2OConfig

from ..passes.capture import EXACT
from ..passes.models import VOCABULARY, tiny
from ..ranks import Ranks, device

if not distributed.is_available():
    pytest.skip("needs torch.distributed", allow_module_level=True)
pytest.importorskip("transformers")

RANKS, LENGTH = 2, 128
DROPPED = S2OConfig(min_length=0, threshold=0.02, ranking=Ranking(rule="dropped", segment=16, near_keys=0))
LAYOUTS = ["head-tail", "contiguous"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    found = Ranks(RANKS, tmp_path_factory.mktemp("ranks") / "store")
    yield found
    found.close()


@pytest.fixture(scope="module")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    if torch.cuda.device_count() < RANKS:
        pytest.skip("needs two GPUs")
    found = Ranks(RANKS, tmp_path_factory.mktemp("gpus") / "store", "nccl")
    yield found
    found.close()


def mesh() -> Any:
    return distributed.device_mesh.init_device_mesh(device(), (1, RANKS), mesh_dim_names=("dp", "cp"))["cp"]


def own(x: torch.Tensor, layout: str) -> torch.Tensor:
    """This rank's part of [B, L]."""
    rank = distributed.get_rank()
    if layout == "contiguous":
        return x.chunk(RANKS, 1)[rank]
    blocks = x.chunk(2 * RANKS, 1)
    return torch.cat([blocks[rank], blocks[2 * RANKS - 1 - rank]], 1)


def inputs(padded: bool) -> dict[str, torch.Tensor]:
    """Tokens of two texts, the first of which is padded on the left where a text is."""
    ids = torch.arange(1, LENGTH + 1).repeat(2, 1) * torch.tensor([[1], [5]]) % VOCABULARY
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[0, :40] = 0
    found = {"input_ids": ids, "position_ids": torch.arange(LENGTH).expand(2, LENGTH), "attention_mask": mask}
    return {name: x.to(device()) for name, x in found.items()}


def model_of(name: str, implementation: str = "s2o") -> Any:
    """A tiny model by name; "mistral" has windows."""
    if name == "mistral":
        from transformers import MistralConfig, MistralForCausalLM

        torch.manual_seed(0)
        config = MistralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, sliding_window=50,
        )  # fmt: skip
        model: Any = MistralForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    else:
        model = tiny(name)
    model.set_attn_implementation(implementation)
    return model.to(device())


def assert_same(got: torch.Tensor, want: torch.Tensor, given: dict[str, torch.Tensor]) -> None:
    """Compare the logits of tokens that are not padding."""
    torch.testing.assert_close(
        got[given["attention_mask"] > 0], want[given["attention_mask"] > 0], rtol=1e-4, atol=1e-4
    )


def logits(model: Any, given: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**given, **options).logits
    return found


def configured(name: str, layout: str, padded: bool, config: S2OConfig) -> None:
    given = inputs(padded)
    one, over_ranks = model_of(name), model_of(name)
    s2o_compile.configure(one, config)
    s2o_compile.configure(over_ranks, config, mesh(), layout)
    want = logits(one, given, use_cache=False)
    part = {key: own(x, layout) for key, x in given.items()}
    for options in ({"use_cache": False}, {}):
        assert_same(logits(over_ranks, part, **options), own(want, layout), part)
    for options in ({"use_cache": False}, {}):
        if not padded:
            assert_same(logits(over_ranks, part | {"attention_mask": None}, **options), own(want, layout), part)


@pytest.mark.parametrize("config", [EXACT, DROPPED], ids=["exact", "dropped"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_configured_models(name: str, layout: str, padded: bool, config: S2OConfig, ranks: Ranks) -> None:
    ranks.call(configured, name, layout, padded, config)


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_on_two_gpus(name: str, layout: str, padded: bool, gpus: Ranks) -> None:
    gpus.call(configured, name, layout, padded, EXACT)
    gpus.call(compiled, name, layout, padded)


def compiled(name: str, layout: str, padded: bool) -> list[str]:
    torch._dynamo.reset()
    given = inputs(padded)
    model = model_of(name, "sdpa")
    want = logits(model, given, use_cache=False)
    part = {key: own(x, layout) for key, x in given.items()}
    backend = without_inductor(s2o_compile.S2OBackend(EXACT))
    compiled = torch.compile(model, backend=backend, options={"mesh": mesh(), "layout": layout})
    assert_same(logits(compiled, part, use_cache=False), own(want, layout), part)
    return [str(decision) for decision in backend.report.decisions]


def without_inductor(backend: Any) -> Any:
    """A backend whose graphs run as they are."""
    import torch._inductor.compile_fx as compile_fx

    compile_fx.compile_fx = lambda module, inputs, **options: module.forward
    return backend


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_models(name: str, layout: str, padded: bool, ranks: Ranks) -> None:
    decisions, others = ranks.call(compiled, name, layout, padded)
    assert decisions == others and len(decisions) == 2
    for decision in decisions:
        assert "sparse; causal, offset 0" in decision and "the keys of all ranks are gathered" in decision
        assert ("window 50" in decision) == (name == "mistral")


def inside_context_parallel(with_hooks: bool) -> None:
    from torch.distributed.tensor.experimental import context_parallel

    given, cp = inputs(padded=False), mesh()
    one, over_ranks = model_of("llama"), model_of("llama")
    s2o_compile.configure(one, DROPPED)
    want = logits(one, given)
    s2o_compile.configure(over_ranks, DROPPED, cp)
    if with_hooks:
        from accelerate.big_modeling import _attach_context_parallel_hooks

        _attach_context_parallel_hooks(over_ranks)
    buffers = [given["input_ids"].clone(), given["position_ids"].clone()]
    with torch.no_grad(), context_parallel(cp, buffers=buffers, buffer_seq_dims=[1, 1]):
        ids, positions = buffers
        assert ids.shape == (2, LENGTH // RANKS)
        got = over_ranks(ids, position_ids=positions, use_cache=not with_hooks).logits
        torch.testing.assert_close(got, own(want, "head-tail"), rtol=1e-4, atol=1e-4)
        x = torch.randn(1, 2, 32, 8)
        assert s2o_compile.attention(x, x, x, True, config=DROPPED, mesh=cp).shape == x.shape
        dense = S2OConfig(min_length=2**62)
        assert s2o_compile.attention(x, x, x, True, config=dense, mesh=cp).shape == x.shape
        with pytest.raises(RuntimeError, match="pass mesh="):
            s2o_compile.attention(x, x, x, True, config=DROPPED)


def test_inside_context_parallel(ranks: Ranks) -> None:
    ranks.call(inside_context_parallel, False)


def test_with_the_hooks_of_accelerate(ranks: Ranks) -> None:
    pytest.importorskip("accelerate")
    ranks.call(inside_context_parallel, True)


def refused_models() -> None:
    given, cp = {key: own(x, "head-tail") for key, x in inputs(padded=False).items()}, mesh()
    model = model_of("llama")
    s2o_compile.configure(model, EXACT, cp)
    with pytest.raises(ValueError, match="transformers sees documents where position_ids jump unless"):
        # A document ends in the middle of a block.
        jump = torch.arange(LENGTH // RANKS).expand(2, -1) % 20
        logits(model, given | {"attention_mask": None, "position_ids": jump}, use_cache=False)
    with pytest.raises(ValueError, match=r"with a mask of shape \[2, 1, 64, 64\]: pass an attention_mask"):
        logits(model, given | {"attention_mask": torch.ones(2, 1, 64, 64, dtype=torch.bool)})
    with torch.no_grad():
        cache = model(**given).past_key_values
    step = {"input_ids": given["input_ids"][:, :1]}
    with pytest.raises(ValueError, match="of as many keys as queries, not another of 1 queries and 65 keys"):
        logits(model, step, past_key_values=cache)
    with pytest.raises(
        ValueError, match="cannot attend to the keys of all ranks of its mesh where gradients are needed"
    ):
        model(**given)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="cannot have its masks compiled; compile a model with 'sdpa'"):
        logits(torch.compile(model, backend="eager"), given, use_cache=False)
    with pytest.raises(ValueError, match="layout must be 'head-tail' or 'contiguous', not 'zigzag'"):
        s2o_compile.configure(model, EXACT, cp, "zigzag")
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh or a ProcessGroup, not 2"):
        s2o_compile.configure(model, EXACT, 2)  # type: ignore[arg-type]


def saved_models(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    cp = mesh()
    model = model_of("llama")
    s2o_compile.configure(model, EXACT, cp)
    given = {key: own(x, "head-tail") for key, x in inputs(padded=False).items()}
    want = logits(model, given)
    assert torch.equal(logits(copy.deepcopy(model), given), want)
    if distributed.get_rank() == 0:
        model.save_pretrained(folder)
    distributed.barrier()
    assert "sharding" not in (folder / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="s2o").eval()
    alone = logits(loaded, given)
    assert not torch.allclose(alone, want)
    s2o_compile.configure(loaded, EXACT, cp)
    assert torch.equal(logits(loaded, given), want)
    s2o_compile.configure(loaded, EXACT)
    assert torch.equal(logits(loaded, given), alone)


def test_models_that_are_refused(ranks: Ranks) -> None:
    ranks.call(refused_models)


def test_models_are_saved_without_their_mesh(ranks: Ranks, tmp_path: Path) -> None:
    ranks.call(saved_models, tmp_path)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    return scaled_dot_product_attention(query, key, value, **options)


def attend_all_but_the_first(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    seen = torch.arange(key.shape[2])[None] > 3
    return scaled_dot_product_attention(query, key, value, attn_mask=seen)


def refused_sites() -> None:
    backend, cp = without_inductor(s2o_compile.S2OBackend(EXACT)), mesh()
    x, long = torch.randn(1, 2, 32, 8), torch.randn(1, 2, 64, 8)

    def run(*arguments: Any, function: Any = attend, gradients: bool = False, **keywords: Any) -> Any:
        torch._dynamo.reset()
        with torch.set_grad_enabled(gradients):
            return torch.compile(function, backend=backend, options=options)(*arguments, **keywords)

    options: dict[str, Any] = {"mesh": cp}

    site = r"attention site \S+ \(.*test_context_over_ranks.*\) cannot attend to the keys of all ranks: "
    with pytest.raises(Exception, match=site + "it has 32 queries and 64 keys; run a prefill"):
        run(x, long, long)
    with pytest.raises(
        Exception, match=site + "its mask is more than a causal one, a window and padding: boolean mask"
    ):
        run(x, x, x, attn_mask=torch.ones(32, 32, dtype=torch.bool))
    with pytest.raises(Exception, match=site + "its mask is more than a causal one, a window and padding: key padding"):
        run(x, x, x, function=attend_all_but_the_first)
    with pytest.raises(Exception, match=site + "dropout is active"):
        run(x, x, x, dropout_p=0.5)
    with pytest.raises(Exception, match=site + "gradients are needed"):
        run(x.clone().requires_grad_(), x, x, gradients=True)
    with pytest.raises(Exception, match="layout must be left out without a mesh, not 'contiguous'"):
        options = {"layout": "contiguous"}
        run(x, x, x)
    with pytest.raises(Exception, match="mesh must be a DeviceMesh or a ProcessGroup, not 3"):
        options = {"mesh": 3}
        run(x, x, x)


def test_sites_that_are_refused(ranks: Ranks) -> None:
    ranks.call(refused_sites)
