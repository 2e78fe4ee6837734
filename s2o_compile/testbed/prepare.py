"""What every prefill starts with: a model, and a document that it can read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .._console import Progress
from .document import Document, build_document, check_document, read_texts
from .memory import check_memory
from .model import check_length, choose_device, choose_dtype, load_model, model_name


def prepare_prefill(
    name: str | None, length: int, document: Path | None, device: str, dtype: str, progress: Progress
) -> tuple[Any, Document]:
    """`prepare_prefills` for one document."""
    model, (text,) = prepare_prefills(name, length, 1, document, device, dtype, progress)
    return model, text


def prepare_prefills(
    name: str | None, length: int, count: int, document: Path | None, device: str, dtype: str, progress: Progress
) -> tuple[Any, list[Document]]:
    """Load a model, and build documents of `length` tokens for it.

    Args:
        name: A path or hub id; None for SmolLM2-135M-Instruct.
        length: Tokens of each document.
        count: How many documents, from consecutive pieces of text.
        document: A text file, which is one piece; None for Python's standard library, of which each module is one.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        progress: Where to show progress.

    Raises:
        UsageError: Something that the user can change is in the way.
    """
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    check_document(document, length)
    with progress.step("Loading the model"):
        model, tokenizer = load_model(name, where, precision)
    check_length(model, model_name(model, name), length)
    pieces = read_texts(document)
    texts = [build_document(tokenizer, pieces, length, seed) for seed in range(count)]
    check_memory(model, texts[0])
    return model, texts
