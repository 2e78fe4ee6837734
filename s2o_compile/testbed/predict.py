"""What is measured: the time of a prefill, what it predicts, and how much of the attention it computes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .document import Document


@dataclass(frozen=True)
class Prediction:
    """What one prefill predicts at the looked-at positions of a document.

    Attributes:
        seconds: Time of the prefill.
        best: Most likely token by position.
        loss: Negative log-likelihood of the actual token by position.
    """

    seconds: float
    best: dict[int, int]
    loss: dict[int, float]

    def perplexity(self, positions: range) -> float:
        """Perplexity over a stretch of text."""
        return math.exp(sum(self.loss[i] for i in positions) / len(positions))

    def agreement(self, other: Prediction, positions: range) -> float:
        """Share of positions where both hold the same token for the most likely."""
        return sum(self.best[i] == other.best[i] for i in positions) / len(positions)

    def found(self, document: Document, spans: list[range]) -> list[bool]:
        """For each value, whether all its tokens are the most likely ones."""
        return [all(self.best[i] == document.tokens[i] for i in span) for span in spans]


class Prefill:
    """A model, run over whole documents.

    Args:
        model: A causal language model of transformers.
        backend: A backend of ``torch.compile``, by name or as an object; None to leave the model as it is.
    """

    def __init__(self, model: Any, backend: Any) -> None:
        self._model = model if backend is None else torch.compile(model, backend=backend, dynamic=True)
        self._device = next(model.parameters()).device

    def __call__(self, document: Document) -> Prediction:
        """Prefill `document` once, timed."""
        return predict(self._model, document, self._device)

    def compiled_call(self, document: Document) -> Prediction:
        """Prefill `document`; once more where that had to compile, so that compiling is not timed."""
        before = compiled_graphs()
        prediction = self(document)
        return prediction if compiled_graphs() == before else self(document)


def predict(model: Any, document: Document, device: torch.device) -> Prediction:
    """Prefill a document once with a causal language model, compiled or not, timed."""
    inputs = prefill_inputs(document, device)
    synchronize(device)
    start = time.perf_counter()
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    synchronize(device)
    seconds = time.perf_counter() - start
    targets = torch.tensor([document.tokens[i] for i in document.positions], device=logits.device)
    best, loss = _read(logits, targets)
    return Prediction(
        seconds,
        dict(zip(document.positions, best, strict=True)),
        dict(zip(document.positions, loss, strict=True)),
    )


def prefill_inputs(document: Document, device: torch.device) -> dict[str, Any]:
    """Arguments of a model for one prefill that gives logits where the document is looked at.

    As with ``model(**tokenizer(text))``, the mask of ones that a tokenizer gives is among them.
    """
    tokens = torch.tensor([document.tokens], device=device)
    return {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "logits_to_keep": torch.tensor([i - 1 for i in document.positions], device=device),
        "use_cache": True,  # as in serving; without a cache transformers builds a mask for packed documents
    }


def compiled_graphs() -> int:
    """How many graphs `torch.compile` has compiled so far."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def alternate(
    prefills: dict[str, Prefill], document: Document, repeats: int, progress: Callable[[str], None]
) -> dict[str, list[Prediction]]:
    """Prefill a document with each of `prefills` in turn, `repeats` times.

    Args:
        prefills: By name.
        document: What to prefill.
        repeats: Rounds.
        progress: Called with the name before each run.
    """
    results: dict[str, list[Prediction]] = {name: [] for name in prefills}
    for _ in range(repeats):
        for name, prefill in prefills.items():
            progress(name)
            results[name].append(prefill.compiled_call(document))
    return results


def _read(logits: torch.Tensor, targets: torch.Tensor) -> tuple[list[int], list[float]]:
    best: list[int] = []
    loss: list[float] = []
    for rows, wanted in zip(logits.split(256), targets.split(256), strict=True):
        best += rows.argmax(-1).tolist()
        loss += torch.nn.functional.cross_entropy(rows.float(), wanted, reduction="none").tolist()
    return best, loss


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
