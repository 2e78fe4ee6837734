"""The models that are prefilled, and their tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from s2o_compile._console import UsageError
from s2o_compile.testbed.document import build_document, read_texts
from s2o_compile.testbed.memory import free_bytes
from s2o_compile.testbed.model import load_model, model_name

RANDOM_LLAMA = "llama-3.1-8b"
SMOLLM2 = "smollm2"


@dataclass(frozen=True)
class Subject:
    """A model and what it reads.

    Attributes:
        name: For reports.
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; None where weights are random, and tokens too.
    """

    name: str
    model: Any
    tokenizer: Any

    @property
    def is_random(self) -> bool:
        """Whether the weights are random."""
        return self.tokenizer is None

    @property
    def positions(self) -> int:
        """The longest text that the model was made for."""
        return self.model.config.get_text_config().max_position_embeddings

    def tokens(self, length: int, document: Path | None) -> torch.Tensor:
        """A prompt [1, length]: random, or of a document, by default Python's standard library.

        Raises:
            UsageError: The document cannot be read or is too short.
        """
        if self.is_random:
            generator = torch.Generator().manual_seed(0)
            tokens = torch.randint(self.model.config.vocab_size, (1, length), generator=generator)
        else:
            tokens = torch.tensor([build_document(self.tokenizer, read_texts(document), length).tokens])
        return tokens.to(self.model.device)


def load(name: str, layers: int, device: torch.device, dtype: torch.dtype) -> Subject:
    """A model by `RANDOM_LLAMA`, `SMOLLM2`, path or hub id; `layers` is for random weights.

    Raises:
        UsageError: It cannot be loaded, or there is not enough memory for it.
    """
    if name == RANDOM_LLAMA:
        return Subject(f"{name}, {layers} layers of random weights", random_model(llama(layers), device, dtype), None)
    path = None if name == SMOLLM2 else name
    model, tokenizer = load_model(path, device, dtype)
    return Subject(model_name(model, path), model, tokenizer)


def llama(layers: int) -> Any:
    """The configuration of Llama-3.1-8B, with so many layers of its 32 and plain rotary embeddings."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )  # fmt: skip


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """A causal language model of random weights, made on the device.

    Raises:
        UsageError: There is not enough memory for the weights.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        numbers = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    needed, free = numbers * dtype.itemsize, free_bytes(device)
    if free is not None and needed > free:
        raise UsageError(
            f"The weights of {config.num_hidden_layers} layers take {needed / 2**30:.1f} GiB and {free / 2**30:.1f} "
            "GiB are free: use fewer --layers."
        )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)
