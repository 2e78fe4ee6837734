"""What the examples run on: a tiny random Llama, or any causal language model of transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

Model = Annotated[str | None, typer.Argument(help="A path or hub id; a tiny random model by default.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of the prompt.")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(name: str | None, length: int, attention: str) -> tuple[Any, torch.Tensor]:
    """A model, and a prompt [1, length] for it: source code, or for the random model noise.

    Raises:
        typer.Exit: There is no such model.
    """
    torch.manual_seed(0)
    if name is None:
        config = LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=max(1024, 2 * length), eos_token_id=None,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        return model.eval().to(DEVICE), torch.randint(256, (1, length), device=DEVICE)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", attn_implementation=attention)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        print(f"The model {name} cannot be loaded: {str(error).splitlines()[0]}", file=sys.stderr)
        raise typer.Exit(2) from error
    code = "".join(path.read_text(encoding="utf-8") for path in sorted(Path(torch.__file__).parent.glob("*.py")))
    ids = tokenizer(code, return_tensors="pt", truncation=True, max_length=length)["input_ids"]
    return model.eval().to(DEVICE), ids.to(DEVICE)
