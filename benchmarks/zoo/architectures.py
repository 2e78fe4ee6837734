"""The architectures of the zoo: their classes in transformers, tiny configurations, inputs and attention sites."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import (
    CACHE,
    IMAGE_TOKEN,
    PADDING,
    STATIC_CACHE,
    VOCABULARY,
    Inputs,
    flat_patches,
    pixels,
    source_and_target,
    spectrogram,
    text,
    text_with_image,
    tokens,
    waveform,
)

GENERATION = ("plain", *PADDING, *CACHE)
WINDOW = 8
BOTH = ["sliding_attention", "full_attention"]
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = SIZE | TOKENS | {"max_position_embeddings": 128}
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
NARROW = GROUPED | {"head_dim": 8}
IMAGE = SIZE | {"image_size": 24, "patch_size": 4}
SMALL_IMAGE = SIZE | {"image_size": 12, "patch_size": 4}
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CONVOLUTIONS = {
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
SEQ2SEQ = TOKENS | {
    "d_model": 32, "max_position_embeddings": 128, "decoder_start_token_id": 1,
    **{f"{part}_{name}": size for part in ("encoder", "decoder")
       for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))},
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A tiny model of one architecture.

    Attributes:
        family: What kind of model it is.
        model: The name of its class in transformers.
        options: Its configuration.
        inputs: Makes the arguments of a plain call.
        sites: How many attentions a plain call computes.
        cached_sites: How many attentions a call onto a cache computes.
        scenarios: How it is called.
    """

    family: str
    model: str
    options: Mapping[str, Any]
    inputs: Callable[[], Inputs]
    sites: int = 2
    cached_sites: int = 2
    scenarios: tuple[str, ...] = ("plain",)

    @property
    def model_class(self) -> Any:
        """Its class."""
        import transformers

        return getattr(transformers, self.model)

    @property
    def implementations(self) -> tuple[str, ...]:
        """The spellings of attention that its class supports."""
        return ("sdpa", "eager") if self.model_class._supports_sdpa else ("eager",)

    def expected_sites(self, scenario: str) -> int:
        """How many attentions a call in a scenario computes."""
        return self.cached_sites if scenario in CACHE | STATIC_CACHE else self.sites

    def build(self, implementation: str) -> Any:
        """The model in evaluation mode, with weights for which no attention is close to uniform."""
        torch.manual_seed(0)
        config = self.model_class.config_class(**self.options)
        return randomise(self.model_class._from_config(config, attn_implementation=implementation).eval())


@torch.no_grad()
def randomise(model: Any) -> Any:
    """The model, with weights for which no attention is close to uniform."""
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(std=weight.shape[-1] ** -0.5)
        else:
            weight.add_(torch.randn_like(weight), alpha=0.1)
    return model


def decoder(model: str, scenarios: tuple[str, ...] = (*GENERATION, *STATIC_CACHE), **options: Any) -> Architecture:
    """A causal language model; not all can be compiled with a static cache."""
    return Architecture("decoder", model, TEXT | options, text, scenarios=scenarios)


def encoder(model: str, sites: int = 2, **options: Any) -> Architecture:
    """A bidirectional text model."""
    return Architecture("encoder", model, TEXT | options, text, sites, scenarios=("plain", *PADDING))


def seq2seq(model: str, **options: Any) -> Architecture:
    """An encoder and a decoder that also attends to the encoder."""
    return Architecture("encoder-decoder", model, SEQ2SEQ | options, source_and_target, 6, 4, GENERATION)


def vision(
    model: str, options: Mapping[str, Any], shape: tuple[int, ...] = (3, 24, 24), sites: int = 2
) -> Architecture:
    """An encoder of images of one shape."""
    return Architecture("vision", model, options, lambda: pixels(*shape), sites)


def audio(model: str) -> Architecture:
    """An encoder of raw audio."""
    options = SIZE | CONVOLUTIONS | {"vocab_size": VOCABULARY}
    return Architecture("audio", model, options, waveform, scenarios=("plain", "right padding"))


def contrastive(model: str, sites: int = 4, **options: Any) -> Architecture:
    """A text encoder and an image encoder."""
    parts = {"text_config": TEXT, "vision_config": SMALL_IMAGE}
    inputs = lambda: text() | pixels(3, 12, 12)  # noqa: E731
    return Architecture("multimodal", model, parts | options, inputs, sites, scenarios=("plain", "right padding"))


def chat(
    model: str,
    size: int,
    image: Callable[[], Inputs],
    sites: int = 4,
    scenarios: tuple[str, ...] = GENERATION,
    **options: Any,
) -> Architecture:
    """A causal language model that reads an image, which takes the place of `size` tokens."""
    inputs = lambda: text_with_image(size) | image()  # noqa: E731
    return Architecture("multimodal", model, options, inputs, sites, scenarios=scenarios)


ARCHITECTURES: dict[str, Architecture] = {
    "biogpt": decoder("BioGptForCausalLM"),
    "bloom": decoder("BloomForCausalLM"),
    "codegen": decoder("CodeGenForCausalLM", rotary_dim=4),
    "cohere": decoder("CohereForCausalLM", **GROUPED),
    "deepseek_v3": decoder(
        "DeepseekV3ForCausalLM", q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=16,
        first_k_dense_replace=1, num_key_value_heads=4,
    ),
    "falcon": decoder("FalconForCausalLM"),
    "falcon_alibi": decoder("FalconForCausalLM", GENERATION, alibi=True),
    "gemma": decoder("GemmaForCausalLM", **NARROW),
    "gemma2": decoder("Gemma2ForCausalLM", **NARROW, sliding_window=WINDOW),
    "gemma3": decoder("Gemma3ForCausalLM", **NARROW, sliding_window=WINDOW, layer_types=BOTH),
    "glm": decoder("GlmForCausalLM", **NARROW),
    "gpt2": decoder("GPT2LMHeadModel"),
    "gpt_bigcode": decoder("GPTBigCodeForCausalLM"),
    "gpt_neo": decoder(
        "GPTNeoForCausalLM", GENERATION, attention_types=[[["global", "local"], 1]], window_size=WINDOW, num_layers=2
    ),
    "gpt_neox": decoder("GPTNeoXForCausalLM"),
    "gpt_oss": decoder("GptOssForCausalLM", **NARROW, num_local_experts=4, sliding_window=WINDOW),
    "gptj": decoder("GPTJForCausalLM", rotary_dim=4),
    "granite": decoder("GraniteForCausalLM", **GROUPED),
    "llama": decoder("LlamaForCausalLM", **GROUPED),
    "mistral": decoder("MistralForCausalLM", **NARROW, sliding_window=WINDOW),
    "mixtral": decoder("MixtralForCausalLM", **GROUPED, num_local_experts=4),
    "mpt": decoder("MptForCausalLM", GENERATION),
    "nemotron": decoder("NemotronForCausalLM", **GROUPED),
    "olmo": decoder("OlmoForCausalLM", **GROUPED),
    "olmo2": decoder("Olmo2ForCausalLM", **GROUPED),
    "opt": decoder("OPTForCausalLM", ffn_dim=48, word_embed_proj_dim=32),
    "persimmon": decoder("PersimmonForCausalLM"),
    "phi": decoder("PhiForCausalLM"),
    "phi3": decoder("Phi3ForCausalLM", **GROUPED),
    "qwen2": decoder("Qwen2ForCausalLM", **GROUPED),
    "qwen2_moe": decoder(
        "Qwen2MoeForCausalLM", **GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3": decoder("Qwen3ForCausalLM", **NARROW),
    "smollm3": decoder("SmolLM3ForCausalLM", **GROUPED),
    "stablelm": decoder("StableLmForCausalLM", **GROUPED),
    "starcoder2": decoder("Starcoder2ForCausalLM", **GROUPED),
    "xglm": decoder("XGLMForCausalLM", ffn_dim=48),
    "albert": encoder("AlbertModel", embedding_size=16),
    "bert": encoder("BertModel"),
    "camembert": encoder("CamembertModel"),
    "deberta_v2": encoder(
        "DebertaV2Model", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16
    ),
    "distilbert": encoder("DistilBertModel", hidden_dim=48),
    "electra": encoder("ElectraModel", embedding_size=32),
    "esm": encoder("EsmModel", mask_token_id=4, position_embedding_type="rotary"),
    "modernbert": encoder(
        "ModernBertModel", local_attention=WINDOW, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    ),
    "mpnet": encoder("MPNetModel"),
    "roberta": encoder("RobertaModel"),
    "xlm_roberta": encoder("XLMRobertaModel"),
    "bart": seq2seq("BartModel"),
    "m2m_100": seq2seq("M2M100Model"),
    "marian": seq2seq("MarianModel"),
    "mbart": seq2seq("MBartModel"),
    "pegasus": seq2seq("PegasusModel"),
    "t5": seq2seq("T5Model", d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "beit": vision("BeitModel", IMAGE | {"use_relative_position_bias": True}),
    "clip_vision": vision("CLIPVisionModel", IMAGE),
    "deit": vision("DeiTModel", IMAGE),
    "dinov2": vision("Dinov2Model", IMAGE),
    "sam_vision": vision(
        "SamVisionModel",
        IMAGE | {"window_size": 4, "global_attn_indexes": [1], "output_channels": 8, "mlp_dim": 48},
    ),
    "segformer": vision(
        "SegformerModel",
        {
            "depths": [1, 1], "num_encoder_blocks": 2, "hidden_sizes": [16, 32], "num_attention_heads": [2, 4],
            "sr_ratios": [2, 1], "patch_sizes": [4, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
        },
    ),
    "siglip_vision": vision("SiglipVisionModel", IMAGE, sites=3),
    "swin": vision("SwinModel", WINDOWS, (3, 32, 32), 4),
    "swinv2": vision("Swinv2Model", WINDOWS, (3, 32, 32), 4),
    "videomae": vision("VideoMAEModel", IMAGE | {"num_frames": 4, "tubelet_size": 2}, (4, 3, 24, 24)),
    "vit": vision("ViTModel", IMAGE),
    "yolos": vision("YolosModel", IMAGE | {"image_size": [24, 24], "num_detection_tokens": 5}),
    "ast": Architecture(
        "audio", "ASTModel",
        SIZE | {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 24, "num_mel_bins": 16},
        lambda: spectrogram("input_values", 24, 16),
    ),
    "hubert": audio("HubertModel"),
    "wav2vec2": audio("Wav2Vec2Model"),
    "whisper": Architecture(
        "audio", "WhisperModel",
        SEQ2SEQ | {"max_source_positions": 32, "max_target_positions": 64, "num_mel_bins": 8},
        lambda: spectrogram("input_features", 8, 64, decoder_input_ids=tokens()),
        6, 4, ("plain", "prefill", "decode"),
    ),
    "blip": contrastive("BlipModel", projection_dim=16),
    "clip": contrastive("CLIPModel", projection_dim=16),
    "siglip": contrastive("SiglipModel", sites=5),
    "llava": chat(
        "LlavaForConditionalGeneration", 9, lambda: pixels(3, 12, 12), image_token_index=IMAGE_TOKEN,
        text_config={"model_type": "llama", **TEXT, **GROUPED}, vision_feature_layer=-1,
        vision_config={"model_type": "clip_vision_model", **SMALL_IMAGE},
    ),
    "qwen2_vl": chat(
        "Qwen2VLModel", 4, lambda: flat_patches(4, 4), image_token_id=IMAGE_TOKEN, vision_start_token_id=4, sites=6,
        scenarios=("plain", *PADDING, "prefill", "decode"),
        text_config=TEXT | GROUPED | {
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "in_channels": 3,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
    ),
    "smolvlm": chat(
        "SmolVLMModel", 9, lambda: pixels(1, 3, 24, 24), image_token_id=IMAGE_TOKEN, scale_factor=2,
        text_config={"model_type": "llama", **TEXT, **GROUPED}, vision_config=IMAGE,
    ),
}  # fmt: skip


def calls(architectures: Mapping[str, Architecture]) -> Iterator[tuple[str, str, str]]:
    """Each architecture by name, with each spelling of its attention and each scenario."""
    for name, architecture in architectures.items():
        for implementation in architecture.implementations:
            for scenario in architecture.scenarios:
                yield name, implementation, scenario
