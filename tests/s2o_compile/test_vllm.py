"""Engines of vLLM on a CPU: at threshold 0 the tokens of vLLM's own attention, with sparse calls in every case.

vLLM needs an environment of its own: ``make test-vllm`` makes one and runs these tests.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM needs an environment of its own: make test-vllm", allow_module_level=True)

import transformers

VOCABULARY = 128
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": 48}),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {
            "sliding_window": 48,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 32,
            "tie_word_embeddings": True,
        },
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {"sliding_window": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": None},
    ),
}
ENGINE = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip
SPARSE = {"S2O_VLLM_CPU": "1", "S2O_THRESHOLD": "0", "S2O_MIN_LENGTH": "40"}
"""Long requests are sparse from 40 keys on, and give what dense attention gives."""

pytestmark = pytest.mark.slow


def prompts(*lengths: int, shared: int = 0) -> list[list[int]]:
    """Random tokens, of which the first ones are the same in all prompts."""
    torch.manual_seed(sum(lengths))
    tokens = torch.randint(1, VOCABULARY, (len(lengths), max(lengths)))
    tokens[:, :shared] = tokens[:1, :shared]
    return [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]


def case(model: str, rounds: list[list[list[int]]], new: int = 8, **options: Any) -> dict[str, Any]:
    """What `vllm_engine` runs; `model` becomes a path."""
    return {"model": model, "rounds": rounds, "new": new, "options": options}


MIXED = [prompts(300, 37, 700, 5, 90)]
ALIKE = prompts(520, 560, 600, 700, shared=512)
HALF = ("bfloat16", "float16")
CASES = {
    **{f"mixed {name}": case(name, MIXED) for name in MODELS},
    "a shared prefix": case("llama", [ALIKE[:1], ALIKE[1:]]),
    "preempted": case("llama", [prompts(300, 280, 260, 270)], 80, num_gpu_blocks_override=40),
    "compiled": case("llama", MIXED, enforce_eager=False),
    "traffic": case("llama", [prompts(*range(100, 900, 33))], 70, num_gpu_blocks_override=60),
    **{dtype: case("llama", MIXED, dtype=dtype) for dtype in HALF},
    "sparser": case("llama", MIXED, additional_config={"s2o": {"threshold": 0.05}}),
}
REFUSED = {
    "float8": case("llama", MIXED, kv_cache_dtype="fp8"),
    "calibration": case("llama", MIXED, additional_config={"s2o": {"calibration": "file.json"}}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with random models by name."""
    folder = tmp_path_factory.mktemp("models")
    for name, (model, configuration, extra) in MODELS.items():
        torch.manual_seed(0)
        made = model(configuration(**(COMMON | extra)))
        for parameter in made.parameters():
            # Larger than what models start with, so that attention is far from uniform.
            parameter.data.normal_(std=0.3)
        made.save_pretrained(folder / name)
    return {name: str(folder / name) for name in MODELS}


def run(models: dict[str, str], folder: Path, cases: dict[str, Any], **variables: str) -> dict[str, Any]:
    """The results of cases by name, from engines in a process with these environment variables."""
    named = {name: case | {"model": models[case["model"]]} for name, case in cases.items()}
    (folder / "cases.json").write_text(json.dumps(named))
    command = [sys.executable, "-m", "tests.s2o_compile.vllm_engine", folder / "cases.json", folder / "results.json"]
    done = subprocess.run(command, env=os.environ | ENGINE | variables, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


@pytest.fixture(scope="module")
def dense(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of vLLM's own attention."""
    return run(models, tmp_path_factory.mktemp("dense"), CASES)


@pytest.fixture(scope="module")
def sparse(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of this attention, and of what it refuses."""
    return run(models, tmp_path_factory.mktemp("sparse"), CASES | REFUSED, **SPARSE)


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*HALF, "sparser")])
def test_tokens_are_those_of_dense_attention(name: str, dense: dict[str, Any], sparse: dict[str, Any]) -> None:
    assert dense[name]["sparse"] == [0]
    assert sparse[name]["sparse"][0] > 0
    assert sparse[name]["tokens"] == dense[name]["tokens"]
    assert sparse[name]["logprob"] == pytest.approx(dense[name]["logprob"], abs=1e-3)


def test_what_the_engine_did(sparse: dict[str, Any]) -> None:
    assert sparse["a shared prefix"]["cached"] >= 3 * 512
    assert sparse["preempted"]["preemptions"] > 0
    assert sparse["traffic"]["preemptions"] > 0


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype: str, dense: dict[str, Any], sparse: dict[str, Any]) -> None:
    """The first token of each prompt, after which rounding may lead to other texts."""
    assert sparse[dtype]["sparse"][0] > 0
    assert sparse[dtype]["first"] == pytest.approx(dense[dtype]["first"], abs=0.2)


def test_settings_by_configuration(dense: dict[str, Any], sparse: dict[str, Any]) -> None:
    assert sparse["sparser"]["sparse"][0] > 0
    assert sparse["sparser"]["logprob"] != dense["sparser"]["logprob"]


def test_refusals(sparse: dict[str, Any]) -> None:
    assert "kv_cache_dtype must be 'auto' or the model's 'float32'" in sparse["float8"]["error"]
    assert "calibration must be None in vLLM" in sparse["calibration"]["error"]


def test_the_backend_for_gpus() -> None:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import AttentionCGSupport

    from s2o_compile.integrations.vllm.cuda import S2OAttentionBackend, S2OAttentionMetadataBuilder

    fits: dict[str, Any] = {
        "head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": 16, "use_mla": False,
        "has_sink": True, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": DeviceCapability(9, 0), "attn_type": "decoder", "has_sliding_window": True,
    }  # fmt: skip
    assert S2OAttentionBackend.validate_configuration(**fits) == []
    for change in (
        {"dtype": torch.float32}, {"kv_cache_dtype": "fp8"}, {"use_mm_prefix": True}, {"attn_type": "encoder_only"},
        {"use_non_causal": True}, {"use_batch_invariant": True}, {"use_dcp": True}, {"use_rswa": True},
    ):  # fmt: skip
        assert len(S2OAttentionBackend.validate_configuration(**fits | change)) == 1, change
    support = S2OAttentionMetadataBuilder.get_cudagraph_support(None, None)
    assert support == AttentionCGSupport.UNIFORM_BATCH, "a graph must not freeze what is long"


def test_memory_is_claimed_in_the_profiling_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from s2o_compile.integrations.vllm.cuda import S2OAttentionImpl

    monkeypatch.setenv("S2O_WORKSPACE", "1000000")
    impl = object.__new__(S2OAttentionImpl)
    impl.max_keys, impl.max_queries, impl.num_heads, impl.num_kv_heads, impl.head_size = 4096, 256, 8, 2, 64
    asked: list[int] = []
    monkeypatch.setattr(torch, "empty", lambda size, **_: asked.append(size))
    query, output = torch.zeros(2, 8, 64, dtype=torch.bfloat16), torch.ones(2, 8, 64)
    for _ in range(2):
        impl.forward(None, query, query, query, query, None, output)
    assert asked == [1_000_000 + 4096 * 2 * 64 * 5 + 256 * 8 * 64 * 2], "once a layer"
    assert not output.any()


def test_an_engine_in_its_own_process(models: dict[str, str], tmp_path: Path, dense: dict[str, Any]) -> None:
    (name, *_) = CASES
    got = run(models, tmp_path, {name: CASES[name]}, **SPARSE, VLLM_ENABLE_V1_MULTIPROCESSING="1")[name]
    assert got["sparse"][0] > 0
    assert got["tokens"] == dense[name]["tokens"]


def test_heads_on_two_processes(models: dict[str, str], tmp_path: Path, dense: dict[str, Any]) -> None:
    (name, *_) = CASES
    split = CASES[name] | {"options": {"tensor_parallel_size": 2}}
    got = run(models, tmp_path, {name: split}, **SPARSE)[name]
    assert len(got["sparse"]) == 2 and min(got["sparse"]) > 0
    assert got["tokens"] == dense[name]["tokens"]


def test_vllm_without_plugins_is_left_alone(models: dict[str, str], tmp_path: Path, dense: dict[str, Any]) -> None:
    (name, *_) = CASES
    got = run(models, tmp_path, {name: CASES[name]}, **SPARSE, VLLM_PLUGINS="none")[name]
    assert got == dense[name] | {"sparse": [0]}
