"""The demo from start to finish: one model, one document, dense and sparse prefill compared."""

from __future__ import annotations

import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .._console import Progress, UsageError
from ..backend import s2o
from ..ops import S2OConfig
from ..testbed.document import LEAST_LENGTH, Document, build_document, check_document, read_texts
from ..testbed.explain import explain_prefill
from ..testbed.memory import check_memory
from ..testbed.model import check_length, choose_device, choose_dtype, load_model, model_name, why_prefill_is_dense
from ..testbed.predict import Prefill, alternate
from .results import Results, compare, read_sites

REPEATS = {"cpu": 1, "cuda": 5}


@dataclass(frozen=True)
class Settings:
    """What to run.

    Attributes:
        length: Tokens of the document.
        document: A text file; None for Python's standard library.
        model: A path or hub id; None for SmolLM2-135M-Instruct.
        config: Settings of sparse attention.
        device: "auto", "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        repeats: Timed prefills of each kind; None for 1 on a CPU and 5 on a GPU.
        seed: Of the hidden values.
        dense_backend: The backend of ``torch.compile`` to compare with.
        force: Whether attention is sparse also where it would run dense, as it does not pay.
    """

    length: int = 8192
    document: Path | None = None
    model: str | None = None
    config: S2OConfig = field(default_factory=S2OConfig)
    device: str = "auto"
    dtype: str = "auto"
    repeats: int | None = None
    seed: int = 3
    dense_backend: str = "inductor"
    force: bool = False


def run_demo(settings: Settings, progress: Progress) -> Results:
    """Run the demo.

    Raises:
        UsageError: Something that the user can change is in the way.
    """
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    repeats = REPEATS[device.type] if settings.repeats is None else settings.repeats
    if repeats < 1:
        raise UsageError(f"--repeats must be at least 1, not {repeats}.")
    check_document(settings.document, settings.length)
    with progress.step("Loading the model"):
        model, tokenizer = load_model(settings.model, device, dtype)
    name = model_name(model, settings.model)
    check_length(model, name, settings.length)
    document = build_document(tokenizer, read_texts(settings.document), settings.length, settings.seed)
    check_memory(model, document)
    config = _choose(settings, model, device, progress)

    prefills = {
        "eager": Prefill(model, None),
        "inductor": Prefill(model, settings.dense_backend),
        "s2o": Prefill(model, s2o.with_config(config)),
    }
    warm_up = build_document(tokenizer, read_texts(settings.document), LEAST_LENGTH)
    compile_seconds = {kind: _first_seconds(kind, prefill, warm_up, progress) for kind, prefill in prefills.items()}
    with progress.step("Prefill") as update:
        runs = alternate(prefills, document, repeats, lambda kind: update(f"Prefill, {kind}"))
    report = explain_prefill(model, document, config, True, "Counting the work of each head", progress)
    dense, sparse = runs["inductor"][0], runs["s2o"][0]
    return Results(
        model=name,
        device=_describe(device),
        dtype=str(dtype).removeprefix("torch."),
        tokens=len(document.tokens),
        config=asdict(config),
        seconds={kind: [run.seconds for run in kinds] for kind, kinds in runs.items()},
        compile_seconds=compile_seconds,
        perplexity={kind: kinds[0].perplexity(document.scored) for kind, kinds in runs.items()},
        scored=len(document.scored),
        agreement=sparse.agreement(dense, document.scored),
        middle=compare(document, dense, sparse, document.middle),
        end=compare(document, dense, sparse, document.end),
        sites=read_sites(report),
    )


def _choose(settings: Settings, model: Any, device: torch.device, progress: Progress) -> S2OConfig:
    """The settings of sparse attention; a prefill that runs dense, as it would not gain, is said to, or forced."""
    reason = why_prefill_is_dense(model, settings.length, device, settings.config)
    if not reason:
        return settings.config
    if settings.force:
        progress.note(f"s2o is forced to be sparse here, by min_length=0. By default this runs dense: {reason}.")
        return replace(settings.config, min_length=0)
    progress.note(f"s2o runs this dense: {reason}. --force makes it sparse.")
    return settings.config


def _first_seconds(kind: str, prefill: Prefill, document: Document, progress: Progress) -> float:
    start = time.perf_counter()
    with progress.step(f"Warming up, {kind}" if kind == "eager" else f"Compiling, {kind}"):
        prefill(document)
    return time.perf_counter() - start


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
