"""``attn_implementation="s2o"``: whole models of transformers, without torch.compile, equal to dense at threshold 0."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import s2o_compile
from s2o_compile import S2OConfig

from ..passes.capture import EXACT, Capture
from ..passes.models import tiny

transformers = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")
masks = pytest.importorskip("s2o_compile.integrations.masks")
settings_of = pytest.importorskip("s2o_compile.integrations.settings").settings_of

VOCABULARY = 97
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {}),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {}),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig, {"sliding_window": 20}),
    "gemma2": (
        transformers.Gemma2ForCausalLM,
        transformers.Gemma2Config,
        {"sliding_window": 20, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8},
    ),
    "gpt_oss": (
        transformers.GptOssForCausalLM,
        transformers.GptOssConfig,
        {"sliding_window": 20, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}
CACHES = ["dynamic", "static"]


def pair(name: str, config: S2OConfig = EXACT) -> tuple[Any, Any]:
    """A tiny model with dense attention, and the same with this one."""
    model, configuration, extra = MODELS[name]
    torch.manual_seed(0)
    dense = model._from_config(configuration(**COMMON, **extra), attn_implementation="eager").eval()
    sparse = model._from_config(configuration(**COMMON, **extra), attn_implementation="s2o").eval()
    for parameter in dense.parameters():
        # Larger than what models start with, so that attention is far from uniform.
        parameter.data.normal_(std=0.3)
    sparse.load_state_dict(dense.state_dict())
    s2o_compile.configure(sparse, config)
    return dense, sparse


def prompts(length: int = 50, batch: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens, of which the first prompt has nine on the left that are padding."""
    torch.manual_seed(length)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, :9] = 0
    return {"input_ids": torch.randint(1, VOCABULARY, (batch, length)) * mask, "attention_mask": mask}


@pytest.fixture
def terms(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The terms of each call of the operator, other than tensors."""
    calls: list[dict[str, Any]] = []
    operator = torch.ops.s2o.attention

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append({"queries": query.shape[2], "keys": key.shape[2], **kwargs})
        return operator(query, key, value, **kwargs)

    monkeypatch.setattr(torch.ops.s2o, "attention", attention)
    return calls


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_prefill(name: str, padded: bool, terms: list[dict[str, Any]]) -> None:
    dense, sparse = pair(name)
    inputs = prompts() if padded else {"input_ids": prompts()["input_ids"]}
    with torch.no_grad():
        want, got = dense(**inputs).logits, sparse(**inputs).logits
    start = 9 if padded else 0
    torch.testing.assert_close(got[:, start:], want[:, start:], atol=1e-4, rtol=1e-4)
    assert len(terms) == 2
    for call in terms:
        assert call["is_causal"] and call["causal_offset"] == 0 and call["mask"] is None
        assert (call["key_padding"] is not None) == padded
    windows = [call["window"] for call in terms]
    assert windows == {"mistral": [20, 20], "gemma2": [20, None], "gpt_oss": [20, None]}.get(name, [None, None])


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("extra", [{}, {"num_beams": 3}, {"prefill_chunk_size": 24}], ids=["greedy", "beams", "chunks"])
def test_generate(name: str, cache: str, extra: dict[str, Any], terms: list[dict[str, Any]]) -> None:
    dense, sparse = pair(name)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, **extra}
    want, got = (model.generate(**prompts(), **options) for model in (dense, sparse))
    assert torch.equal(got, want)
    assert any(call["queries"] > 1 for call in terms)
    special = name in ("gemma2", "gpt_oss")
    assert special or all(call["queries"] > 1 for call in terms), "decoding goes to SDPA"


def test_calls_that_run_dense_are_those_of_sdpa(terms: list[dict[str, Any]]) -> None:
    _, sparse = pair("llama", S2OConfig())
    dense = transformers.LlamaForCausalLM(sparse.config).eval()
    dense.load_state_dict(sparse.state_dict())
    dense.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.equal(sparse(**prompts()).logits, dense(**prompts()).logits)
    assert not terms


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_large_masks_of_dense_calls_are_not_made(
    name: str, padded: bool, terms: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if these prompts were long; without a window and padding SDPA needs no mask, and is called itself."""
    monkeypatch.setattr(masks, "LARGE_MASK", 0)
    monkeypatch.setattr("s2o_compile.ops.dense.LARGE_MASK", 0)
    dense, other = pair(name, S2OConfig())
    inputs = prompts() if padded else {"input_ids": prompts()["input_ids"]}
    with torch.no_grad():
        want, got = dense(**inputs).logits, other(**inputs).logits
    start = 9 if padded else 0
    torch.testing.assert_close(got[:, start:], want[:, start:], atol=1e-4, rtol=1e-4)
    assert all(call["mask"] is None for call in terms)
    if name in ("llama", "qwen2"):
        assert len(terms) == 2 * padded
    else:
        assert len(terms) == 2


@pytest.mark.parametrize("scaling", [-0.4, 0.0])
@pytest.mark.parametrize("config", [EXACT, S2OConfig()], ids=["sparse", "dense"])
def test_scales_of_zero_and_below(config: S2OConfig, scaling: float) -> None:
    """SDPA gives NaN for them, of which it would be handed those that run dense."""
    models, inputs = pair("llama", config), {"input_ids": prompts()["input_ids"]}
    for model in models:
        for layer in model.model.layers:
            layer.self_attn.scaling = scaling
    with torch.no_grad():
        want, got = (model(**inputs).logits for model in models)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_models_keep_their_own_settings(terms: list[dict[str, Any]]) -> None:
    (_, one), (_, other) = pair("llama", EXACT), pair("llama", dataclasses.replace(EXACT, threshold=0.25))
    with torch.no_grad():
        for model in (one, other, one):
            model(**prompts())
    assert [call["threshold"] for call in terms] == [0, 0, 0.25, 0.25, 0, 0]


def test_settings_are_saved_with_the_model(tmp_path: Path, terms: list[dict[str, Any]]) -> None:
    _, model = pair("llama", dataclasses.replace(EXACT, threshold=0.25))
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="s2o")
    with torch.no_grad():
        loaded(**prompts())
    assert [call["threshold"] for call in terms] == [0.25, 0.25]


def test_settings_for_other_attention() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM does not: load it with that argument"):
        s2o_compile.configure(tiny("llama"), EXACT)


def test_wrong_settings_are_named() -> None:
    _, model = pair("llama")
    model.config.s2o = {"treshold": 0.1}
    with torch.no_grad(), pytest.raises(ValueError, match="unknown option 'treshold'"):
        model(**prompts())


def test_pipeline() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, **{f"w{index}": index for index in range(1, VOCABULARY)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", padding_side="left")
    texts = [" ".join(f"w{index}" for index in range(1, length)) for length in (60, 40)]
    answers = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)(
            texts, batch_size=2, max_new_tokens=8, do_sample=False
        )
        for model in pair("llama")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("padded", [False, True])
def test_bidirectional(padded: bool, terms: list[dict[str, Any]]) -> None:
    dense = tiny("bert")
    sparse = transformers.BertModel(copy.deepcopy(dense.config)).eval()
    sparse.load_state_dict(dense.state_dict())
    sparse.set_attn_implementation("s2o")
    s2o_compile.configure(sparse, EXACT)
    inputs = prompts() if padded else {"input_ids": prompts()["input_ids"]}
    with torch.no_grad():
        want, got = (model(**inputs).last_hidden_state for model in (dense, sparse))
    seen = prompts()["attention_mask"].bool() if padded else ...
    torch.testing.assert_close(got[seen], want[seen], atol=1e-4, rtol=1e-4)
    assert [call["is_causal"] for call in terms] == [False, False]
    assert all((call["key_padding"] is not None) == padded for call in terms)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_gradients_and_dropout_run_dense(name: str, terms: list[dict[str, Any]]) -> None:
    dense, sparse = pair(name)
    for model in (dense, sparse):
        model(**prompts()).logits[:, 9:].square().sum().backward()
    for one, other in zip(dense.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, atol=1e-3, rtol=1e-3)
    sparse.train()
    inputs = prompts()
    for layer in sparse.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with torch.no_grad():
        first, second = sparse(**inputs).logits, sparse(**inputs).logits
    assert not terms and not torch.equal(first, second)


def test_a_soft_cap_has_no_gradients() -> None:
    _, sparse = pair("gemma2")
    with pytest.raises(ValueError, match="where gradients are needed; use 'eager'"):
        sparse(**prompts())


def test_checkpointing_runs_dense(terms: list[dict[str, Any]]) -> None:
    _, sparse = pair("llama")
    sparse.train()
    sparse.gradient_checkpointing_enable()
    sparse(**prompts()).logits.sum().backward()
    assert not terms and all(parameter.grad is not None for parameter in sparse.parameters())


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_autocast(name: str, terms: list[dict[str, Any]]) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, got = (model(**prompts()).logits[:, 9:].float() for model in pair(name))
    assert len(terms) == 2
    torch.testing.assert_close(got, want, atol=2e-2 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_right(name: str) -> None:
    ids, mask = prompts()["input_ids"], prompts()["attention_mask"].flip(1)
    with torch.inference_mode():
        want, got = (model(ids, attention_mask=mask).logits[mask.bool()] for model in pair(name))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


PACKED: dict[str, Any] = {
    "input_ids": torch.arange(1, 51)[None],
    "position_ids": torch.cat([torch.arange(20), torch.arange(30)])[None],
}
LENGTHS = {"cu_seq_lens_q": torch.tensor([0, 20, 50]), "cu_seq_lens_k": torch.tensor([0, 20, 50])}


@pytest.mark.parametrize("name", sorted({*MODELS} - {"gpt_oss"}))
def test_packed_documents(name: str) -> None:
    with torch.no_grad():
        want, got = (model(**PACKED, **LENGTHS, use_cache=False).logits for model in pair(name))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [EXACT, S2OConfig()])
@pytest.mark.parametrize(("name", "use_cache"), [("llama", True), ("gpt_oss", False)])
def test_packed_documents_that_no_mask_tells_apart(name: str, use_cache: bool, config: S2OConfig) -> None:
    _, sparse = pair(name, config)
    with torch.no_grad(), pytest.raises(ValueError, match="cu_seq_lens_q packs 2 documents, which the mask does not"):
        sparse(**PACKED, **LENGTHS, use_cache=use_cache)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("config", [EXACT, S2OConfig()], ids=["sparse", "dense"])
def test_attention_weights_are_refused(name: str, config: S2OConfig) -> None:
    model = tiny(name)
    model.set_attn_implementation("s2o")
    s2o_compile.configure(model, config)
    ids = prompts()["input_ids"]
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"'s2o' computes no attention weights.* use 'eager'"):
            model(ids, output_attentions=True)
        model(ids, output_attentions=False)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_attention_weights_that_a_configuration_asks_for_are_refused(name: str) -> None:
    model = tiny(name)
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    model.set_attn_implementation("s2o")
    with torch.no_grad(), pytest.raises(ValueError, match="'s2o' computes no attention weights"):
        model(prompts()["input_ids"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("indices", "the keys that a model picks"),
        ("block_indices", "the blocks of keys that a model picks"),
        ("sinks", "one sink for each head, and the model one for each query"),
    ],
)
def test_arguments_that_are_not_passed_on_are_refused(name: str, reason: str) -> None:
    attention = transformers.AttentionInterface()["s2o"]
    layer = pair("llama")[1].model.layers[0].self_attn
    with torch.no_grad(), pytest.raises(ValueError, match=reason):
        attention(layer, *[torch.randn(1, 4, 20, 8)] * 3, None, **{name: torch.ones(1, dtype=torch.long)})


def test_models_that_pick_their_keys_are_refused() -> None:
    if not hasattr(transformers, "DeepseekV32ForCausalLM"):
        pytest.skip("comes with a later transformers")
    config = transformers.DeepseekV32Config(
        **{**COMMON, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=8, index_topk=8, index_n_heads=2, index_head_dim=16, first_k_dense_replace=2,
    )  # fmt: skip
    model = transformers.DeepseekV32ForCausalLM._from_config(config, attn_implementation="s2o").eval()
    with torch.no_grad(), pytest.raises(ValueError, match="cannot attend to the keys that a model picks; use 'sdpa'"):
        model(prompts()["input_ids"])


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_masks_of_users(dtype: torch.dtype) -> None:
    dense, sparse = pair("llama")
    ids = prompts()["input_ids"]
    allowed = (torch.rand(2, 1, 50, 50) < 0.5) | torch.eye(50, dtype=torch.bool)
    added = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        want = dense(ids, attention_mask=added).logits
        got = sparse(ids, attention_mask=allowed if dtype == torch.bool else added).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss"])
def test_under_torch_compile(name: str) -> None:
    dense, sparse = pair(name)
    captured = Capture()
    compiled = torch.compile(sparse, backend=captured, fullgraph=name != "gpt_oss")
    with torch.no_grad():
        want, got = (model(**prompts()).logits[:, 9:] for model in (dense, compiled))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    operators = (torch.ops.s2o.attention, torch.ops.s2o.attention.default)
    assert sum(node.target in operators for node in captured.nodes()) == 2


@pytest.mark.parametrize(("cache", "implementation"), [("dynamic", "s2o"), ("static", "sdpa")])
def test_generate_compiled(cache: str, implementation: str) -> None:
    dense, model = pair("llama")
    model.set_attn_implementation(implementation)
    captured = Capture()
    model.forward = torch.compile(model.forward, backend=captured)
    options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(model.generate(**prompts(), **options), dense.generate(**prompts(), **options))
    assert len(captured.operators()) >= 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"ranking": {"pool": 4}}, "the attribute s2o of a model's configuration must be a dictionary of threshold, "),
        ("fast", "the attribute s2o of a model's configuration must be a dictionary of threshold, "),
        ({"error_budget": 0.1}, "unknown option 'error_budget'; the attribute s2o of a model's configuration must be "),
        ({1: 2}, "unknown option '1'; the attribute s2o of a model's configuration must be "),
        ({"threshold": None}, "threshold must be a number, not None"),
        ({"min_length": 0, "segment": 32, "tile": 32}, "segment is now a field of Ranking: "),
        ({"settings": "pool"}, "settings must be '' or a JSON object of fields of Ranking, not 'pool'"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_one_sentence(settings: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        settings_of(transformers.LlamaConfig(s2o=settings))
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_a_configuration_may_leave_settings_out() -> None:
    assert settings_of(transformers.LlamaConfig()) == S2OConfig()
    assert settings_of(transformers.LlamaConfig(s2o={"threshold": 0.1})) == S2OConfig(0.1)


FUNCTIONS = {
    "causal": masking.causal_mask_function,
    "bidirectional": masking.bidirectional_mask_function,
    "window": masking.sliding_window_causal_mask_function(7),
    "window on both sides": masking.sliding_window_bidirectional_mask_function(7),
    "window of 1": masking.sliding_window_causal_mask_function(1),
}


@given(st.sampled_from(list(FUNCTIONS)), st.integers(2, 20), st.integers(1, 30), st.integers(0, 25), st.integers(0, 25))
def test_masks_say_what_transformers_says(name: str, queries: int, keys: int, q_offset: int, kv_offset: int) -> None:
    config = transformers.LlamaConfig(s2o=EXACT.arguments())
    arguments = (2, queries, keys, q_offset, kv_offset, FUNCTIONS[name])
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    with torch.no_grad():
        want = masking.sdpa_mask(*arguments, **skips)
        padding = torch.rand(2, kv_offset + keys) < 0.8
        padded = masking.sdpa_mask(*arguments, padding, **skips)
        assert torch.equal(masks.s2o_mask(*arguments, config=config), want)
        lazy = masks.s2o_mask(*arguments, padding, config=config)
    assert torch.equal(lazy, padded)
    assert torch.equal(lazy[:, :, 1:] | False, padded[:, :, 1:])
    assert lazy.contiguous() is lazy


@pytest.mark.parametrize(
    "function",
    [
        masking.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.long)),
        masking.or_masks(masking.causal_mask_function, masking.bidirectional_mask_function),
        lambda batch, head, query, key: key <= query,
    ],
)
def test_other_masks_stay_tensors(function: Any) -> None:
    config = transformers.LlamaConfig(s2o=EXACT.arguments())
    with torch.no_grad():
        found = masks.s2o_mask(2, 20, 30, 10, mask_function=function, config=config)
        assert type(found) is torch.Tensor
        assert torch.equal(found, masking.sdpa_mask(2, 20, 30, 10, mask_function=function))


@pytest.mark.parametrize("overlay", ["or_mask_function", "and_mask_function"])
def test_masks_of_models_that_add_to_them(overlay: str) -> None:
    def function(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (query // 5 == key // 5) ^ (key == 3)

    made = [
        masking.create_causal_mask(
            transformers.LlamaConfig(attn_implementation=implementation, s2o=EXACT.arguments()),
            torch.zeros(2, 20, 8), prompts(20)["attention_mask"], None, **{overlay: function},
        )
        for implementation in ("sdpa", "s2o")
    ]  # fmt: skip
    assert type(made[1]) is torch.Tensor and torch.equal(*made)


def test_masks_keep_what_padding_was() -> None:
    config = transformers.LlamaConfig(s2o=EXACT.arguments())
    padding = prompts(20)["attention_mask"].bool()
    with torch.no_grad():
        want = masking.sdpa_mask(2, 20, 20, attention_mask=padding)
        lazy = masks.s2o_mask(2, 20, 20, attention_mask=padding, config=config)
    padding.fill_(False)
    assert torch.equal(lazy, want)


def test_masks_made_for_other_lengths_are_wrong_as_with_sdpa() -> None:
    layer = pair("llama")[1].model.layers[0].self_attn
    query, key = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 30, 8)
    for implementation in ("sdpa", "s2o"):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"must match the (existing )?size"):
            mask = masks.s2o_mask(2, 20, 20, attention_mask=prompts(20)["attention_mask"].bool(), config=layer.config)
            transformers.AttentionInterface()[implementation](layer, query, key, key, mask)


def test_registered_when_transformers_is_imported_later() -> None:
    code = (
        "import s2o_compile, sys\nassert 'transformers' not in sys.modules\n"
        "from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions\n"
        "from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks\n"
        "print(functions['s2o'].__module__, masks['s2o'].__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["s2o_compile.integrations.transformers", "s2o_compile.integrations.masks"]
