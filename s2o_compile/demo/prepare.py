"""What every prefill starts with: a model, and a document that it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .document import Document, build_document, read_texts
from .memory import check_memory
from .model import check_length, choose_device, choose_dtype, load_model, model_name
from .progress import Progress


def prepare_prefill(
    name: str | None, length: int, document: Path | None, device: str, dtype: str, progress: Progress
) -> tuple[Any, Document]:
    """Load a model, and build a document of `length` tokens for it.

    Args:
        name: A path or hub id; None for SmolLM2-135M-Instruct.
        length: Tokens of the document.
        document: A text file; None for Python's standard library.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        progress: Where to show progress.

    Raises:
        DemoError: Something that the user can change is in the way.
    """
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    with progress.step("Loading the model"):
        model, tokenizer = load_model(name, where, precision)
    check_length(model, model_name(model, name), length)
    text = build_document(tokenizer, read_texts(document), length)
    check_memory(model, text)
    return model, text
