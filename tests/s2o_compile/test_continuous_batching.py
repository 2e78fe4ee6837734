"""``generate_batch`` of transformers with ``attn_implementation="s2o"``: at threshold 0 the tokens of dense attention.

Wrong wiring is silent, so each test also counts the sparse calls.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch

import s2o_compile
from s2o_compile import S2OConfig

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
offloading_manager = pytest.importorskip("transformers.generation.continuous_batching.offloading_manager")
continuous_api = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
paged_masks = pytest.importorskip("s2o_compile.integrations.masks")
integration = pytest.importorskip("s2o_compile.integrations.continuous_batching")

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": 24}),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {"sliding_window": 24, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}
EXACT = S2OConfig(threshold=0.0, min_length=40)
"""Prompts and chunks that have 40 keys are sparse, tokens that decode are dense, and all is as dense attention."""
NEW = 6
ENGINE: dict[str, Any] = {"page_size": 16, "num_blocks": 40, "max_batch_tokens": 64}


def pair(name: str, config: S2OConfig = EXACT) -> tuple[Any, Any]:
    """A tiny model with the engine's dense attention, and the same with this one."""
    model, configuration, extra = MODELS[name]
    dense = model._from_config(configuration(**COMMON, **extra), attn_implementation="eager").eval()
    torch.manual_seed(0)
    for parameter in dense.parameters():
        # Larger than what models start with, so that attention is far from uniform.
        parameter.data.normal_(std=0.3)
    sparse = model._from_config(configuration(**COMMON, **extra), attn_implementation="s2o").eval()
    sparse.load_state_dict(dense.state_dict())
    s2o_compile.configure(sparse, config)
    return dense, sparse


def prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Random tokens, of which the first ones are the same in all prompts."""
    torch.manual_seed(sum(lengths))
    tokens = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)))
    tokens[:, :shared] = tokens[:1, :shared]
    return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]


def outputs_of(model: Any, inputs: list[list[int]], new: int = NEW, **engine: Any) -> list[Any]:
    """What a model answers to each prompt, with an engine of these settings beside `ENGINE`."""
    settings = transformers.ContinuousBatchingConfig(**(ENGINE | engine))
    greedy = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    outputs = model.generate_batch(inputs, generation_config=greedy, continuous_batching_config=settings)
    assert not [output.error for output in outputs.values() if output.error]
    return sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[1]))


def generate(model: Any, inputs: list[list[int]], new: int = NEW, **engine: Any) -> list[list[int]]:
    """The tokens of `outputs_of`."""
    return [output.generated_tokens for output in outputs_of(model, inputs, new, **engine)]


def sparse_calls(profile: s2o_compile.Profile) -> int:
    """How many calls took the sparse path."""
    return sum(site.calls for site in profile.sites)


def watch_evictions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """How many requests lost their pages, each time that some did, and how many of these were copied to the CPU."""
    evicted: list[tuple[int, int]] = []
    to_cpu = offloading_manager.OffloadingManager._offload_to_cpu

    def offload_to_cpu(manager: Any, requests: Any, *rest: Any) -> Any:
        moved = to_cpu(manager, requests, *rest)
        evicted.append((len(requests), len(moved)))
        return moved

    monkeypatch.setattr(offloading_manager.OffloadingManager, "_offload_to_cpu", offload_to_cpu)
    return evicted


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        *(("llama", budget) for budget in (64, 50, 200)),
        ("mistral", 50),
        ("gpt_oss", 200),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("mistral", 64), ("mistral", 200))),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("gpt_oss", 64), ("gpt_oss", 50))),
    ],
)
def test_prompts_cut_anywhere(name: str, budget: int) -> None:
    dense, sparse = pair(name)
    inputs = prompts(90, 7, 200, 33, 64)
    want = generate(dense, inputs, max_batch_tokens=budget)
    with s2o_compile.profile() as profile:
        got = generate(sparse, inputs, max_batch_tokens=budget)
    assert got == want
    assert sparse_calls(profile) > 0


def test_cuts_between_segments_change_nothing_but_rounding() -> None:
    """Above threshold 0, and of heads whose channels all rank; other parts of a model round as their shapes are."""
    _, sparse = pair("llama", S2OConfig(threshold=0.05, min_length=33))
    found = []
    for budget in (192, 96, 64):
        with s2o_compile.profile(error_rows=0) as profile:
            (output,) = outputs_of(sparse, prompts(192), max_batch_tokens=budget, return_logprobs=True)
        assert [site.calls for site in profile.sites] == [192 // budget] * 2
        found.append(output)
    whole, *cut = found
    for output in cut:
        assert output.generated_tokens == whole.generated_tokens
        assert output.logprobs == pytest.approx(whole.logprobs, abs=1e-4)


def test_tokens_are_those_of_generate() -> None:
    _, sparse = pair("llama")
    inputs = prompts(90, 130)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    want = [sparse.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in inputs]
    with s2o_compile.profile() as profile:
        assert generate(sparse, inputs) == want
    assert sparse_calls(profile) > 0


@pytest.mark.parametrize("sharing", [True, False])
def test_shared_prefixes(sharing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = pair("llama")
    inputs = prompts(150, 170, 160, 180, shared=128)
    chunks: list[int] = []
    operator = torch.ops.s2o.attention_varlen

    def attention_varlen(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        chunks.append(len(query))
        return operator(query, *rest, **options)

    monkeypatch.setattr(torch.ops.s2o, "attention_varlen", attention_varlen)
    want = generate(dense, inputs, allow_block_sharing=sharing)
    with s2o_compile.profile() as profile:
        assert generate(sparse, inputs, allow_block_sharing=sharing) == want
    assert sparse_calls(profile) > 0
    prefilled = sum(chunks) // 2
    # Each request has its first token from the prefill, and the last token is never an input.
    everything = sum(map(len, inputs)) + len(inputs) * (NEW - 1)
    assert prefilled < everything if sharing else prefilled == everything


@pytest.mark.parametrize("offload", [0.0, 0.01], ids=["restarts", "offloads"])
@pytest.mark.parametrize("name", MODELS)
def test_caches_that_are_too_small(name: str, offload: float, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, sparse = pair(name)
    # A layer with a window takes its last page when a prompt fills it, and no others.
    lengths = (60, 10, 12, 14) if name == "mistral" else (60, 60, 60, 60)
    inputs, new = prompts(*lengths), 30

    def empty(*shape: Any, pin_memory: bool = False, **rest: Any) -> torch.Tensor:
        """Pinned memory, which needs a GPU, as other memory."""
        return allocate(*shape, **rest)

    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", empty)
    want = generate(dense, inputs, new)
    evicted = watch_evictions(monkeypatch)
    options = {"num_blocks": {"llama": 12, "gpt_oss": 9, "mistral": 5}[name], "cpu_offload_space": offload}
    with s2o_compile.profile() as profile:
        assert generate(sparse, inputs, new, **options) == want
    assert evicted and all(bool(moved) == bool(offload) for _, moved in evicted)
    assert sparse_calls(profile) > 0


def test_no_mask_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    of_sdpa, update = paged_masks.sdpa_mask, continuous_api.ContinuousBatchingIOs.get_model_kwargs

    def get_model_kwargs(ios: Any, *rest: Any, **options: Any) -> Any:
        inputs = update(ios, *rest, **options)
        made.append(inputs["attention_mask"])
        return inputs

    monkeypatch.setattr(paged_masks, "sdpa_mask", lambda *rest, **options: made.append(of_sdpa(*rest, **options)))
    monkeypatch.setattr(continuous_api.ContinuousBatchingIOs, "get_model_kwargs", get_model_kwargs)
    _, sparse = pair("gpt_oss")
    with s2o_compile.profile() as profile:
        generate(sparse, prompts(90, 7))
    assert made and all(mask is None for mask in made)
    assert sparse_calls(profile) > 0


def test_lengths_are_read_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    on_host = integration.on_host
    monkeypatch.setattr(integration, "on_host", lambda *tensors: reads.append(1) or on_host(*tensors))
    steps: list[int] = []
    step = continuous_api.ContinuousBatchProcessor._generation_step
    monkeypatch.setattr(
        continuous_api.ContinuousBatchProcessor,
        "_generation_step",
        lambda *arguments: steps.append(1) or step(*arguments),
    )
    generate(pair("gpt_oss")[1], prompts(90, 7))
    assert len(reads) == len(steps) > 0


def test_models_keep_their_own_settings() -> None:
    (_, one), (_, other) = pair("llama"), pair("llama", dataclasses.replace(EXACT, min_length=10**6))
    counts = []
    for model in (one, other):
        with s2o_compile.profile() as profile:
            generate(model, prompts(90))
        counts.append(sparse_calls(profile))
    assert counts[0] > 0
    assert counts[1] == 0


def test_profile_names_the_layers_and_sees_its_own_block_only() -> None:
    _, sparse = pair("llama", dataclasses.replace(EXACT, threshold=0.05))
    with s2o_compile.profile() as before:
        pass
    with s2o_compile.profile() as profile:
        generate(sparse, prompts(200))
    assert [site.name for site in profile.sites] == ["LlamaAttention 0", "LlamaAttention 1"]
    assert [site.calls for site in profile.sites] == [3, 3], "200 tokens in chunks of 64, the last of 8"
    assert not before.sites


def test_profiles_of_other_threads_see_an_engine_only() -> None:
    query = torch.randn(1, 2, 100, 8)
    call = threading.Thread(target=s2o_compile.attention, args=(query, query, query), kwargs={"config": EXACT})
    with s2o_compile.profile() as profile:
        call.start()
        call.join()
    assert not profile.sites


def with_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **_: False)
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", lambda **_: True)


def test_the_engine_does_not_switch_to_flash_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flash(monkeypatch)
    _, sparse = pair("llama")
    with s2o_compile.profile() as profile:
        generate(sparse, prompts(90))
    assert sparse.config._attn_implementation == "s2o"
    assert sparse_calls(profile) > 0


def test_other_models_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with_flash(monkeypatch)
    dense, _ = pair("llama")
    asked: list[str] = []
    monkeypatch.setattr(dense, "set_attn_implementation", asked.append)
    with s2o_compile.profile() as profile:
        dense.init_continuous_batching(continuous_batching_config=transformers.ContinuousBatchingConfig(**ENGINE))
    assert asked == ["flash_attention_2"]
    assert not profile.sites


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"varlen_compile_config": "compile"}, "varlen_compile_config"),
        ({"use_cuda_graph": True}, "use_cuda_graph"),
    ],
)
def test_graphs_are_refused(options: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "use_cuda_graph":
        monkeypatch.setattr(
            "transformers.generation.continuous_batching.initialization.get_accelerator_graph_name", str
        )
    elif name == "varlen_compile_config":
        options = {name: transformers.generation.configuration_utils.CompileConfig()}
    with pytest.raises(ValueError, match=f"{name} must be off in continuous batching"):
        generate(pair("llama")[1], prompts(90), **options)


def test_a_version_that_packs_keys_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_IS_SUPPORTED", False)
    with pytest.raises(ValueError, match=r"needs transformers 5\.19 or later"):
        generate(pair("llama")[1], prompts(90))


def test_a_cache_without_its_engine_is_refused() -> None:
    _, sparse = pair("llama")
    with torch.no_grad(), pytest.raises(ValueError, match="takes a paged cache from the manager"):
        sparse(torch.tensor(prompts(9)), cache=object(), use_cache=False)
