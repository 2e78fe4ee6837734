"""What the backend does to a model that reads a document."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from .._console import Progress
from .._explain import explain
from ..ops import S2OConfig
from ..passes import Report
from .document import Document
from .predict import prefill_inputs
from .prepare import prepare_prefill


def explain_model(
    name: str | None,
    length: int,
    document: Path | None,
    config: S2OConfig,
    device: str,
    dtype: str,
    measure: bool,
    progress: Progress,
) -> Report:
    """Load a model, let it read the start of a document once, and report its attention sites.

    Args:
        name: A path or hub id; None for SmolLM2-135M-Instruct.
        length: Tokens to read.
        document: A text file; None for Python's standard library.
        config: Settings of sparse attention.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        measure: Whether to count the pairs that each site visits.
        progress: Where to show progress.

    Raises:
        UsageError: Something that the user can change is in the way.
    """
    model, text = prepare_prefill(name, length, document, device, dtype, progress)
    return explain_prefill(model, text, config, measure, "Reading the document", progress)


def explain_prefill(
    model: Any, document: Document, config: S2OConfig, measure: bool, step: str, progress: Progress
) -> Report:
    """Run one prefill as `s2o_compile.explain` does, and show how many sites were measured."""
    device = next(model.parameters()).device
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    count = itertools.count(1)
    with progress.step(step) as update:
        return explain(
            model,
            config=config,
            measure=measure,
            progress=lambda decision: update(done=next(count), total=layers),
            **prefill_inputs(document, device),
        )
