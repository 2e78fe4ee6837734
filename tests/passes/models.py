"""Tiny transformers models with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

VOCABULARY = 97
NAMES = ["llama", "qwen2", "gpt2", "bert"]


def tiny(name: str, layers: int = 2) -> torch.nn.Module:
    """A model by name, in evaluation mode, with SDPA attention."""
    transformers = pytest.importorskip("transformers")
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    classes: dict[str, Any] = {
        "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, {"num_key_value_heads": 2}),
        "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {"num_key_value_heads": 2}),
        "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config, {}),
        "bert": (transformers.BertModel, transformers.BertConfig, {}),
    }
    model, config, extra = classes[name]
    torch.manual_seed(0)
    return model._from_config(config(**common, **extra), attn_implementation="sdpa").eval()


def tokens(length: int, batch: int = 2) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(1, VOCABULARY, (batch, length))


def padding(length: int, side: str | None) -> torch.Tensor | None:
    """A mask [2, length] of nine padded positions on one side of the first sequence; None for no mask."""
    if side is None:
        return None
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, slice(0, 9) if side == "left" else slice(-9, None)] = 0
    return mask
