"""Reads documents with every method and records what each predicts and what work it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from s2o_compile._console import UsageError
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept
from s2o_compile.testbed.document import Document
from s2o_compile.testbed.predict import Prediction, predict, synchronize

from ..capture import read_call
from .attention import DENSE, Attended, Attention, attend_densely
from .cases import PLACES, Case


@dataclass(frozen=True)
class Outcome:
    """What one method makes of one document.

    Attributes:
        method: The method.
        task: The task.
        length: Tokens of the document.
        sample: Which of the task's documents of this length.
        seconds: Of the reading, with the counting of the work and, for the rules of others, their choice in PyTorch.
        density: Mean over the layers that attend by the method, which is all but those with a window.
        ranking: The ranking's products as a share of dense attention's FLOPs, mean over the same layers.
        scored: Tokens that perplexity is measured over.
        loss: Sum of their negative log-likelihoods, in nats.
        agreed: How many of them are predicted to be what dense attention predicts.
        found: By place, for each value, whether it was found.
        nats: By place, for each value, its negative log-likelihood, in nats.
        depths: By place, the depth of each value's fact.
        prefill_seconds: Of the prefill; None for the rules of others.
        attention_seconds: Of the attention in it; None for the rules of others.
    """

    method: str
    task: str
    length: int
    sample: int
    seconds: float
    density: float
    ranking: float
    scored: int
    loss: float
    agreed: int
    found: dict[str, list[bool]]
    nats: dict[str, list[float]]
    depths: dict[str, list[float]]
    prefill_seconds: float | None = None
    attention_seconds: float | None = None

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What tells it from all others of a model."""
        return self.method, self.task, self.length, self.sample


class Work(NamedTuple):
    """What one layer's attention took: the fields of `Attended`, and the seconds with the counting of them."""

    density: float
    ranking: float
    seconds: float | None
    wall: float


def read_case(
    model: Any, case: Case, methods: Mapping[str, Attention], advance: Callable[[], None]
) -> Iterator[Outcome]:
    """Read a document densely and with each of `methods`; `advance` is called after every layer.

    Raises:
        UsageError: No attention of the model is plain causal SDPA.
    """
    dense = None
    for name, attention in {DENSE: attend_densely, **methods}.items():
        prediction, layers = prefill(model, case.document, attention, advance)
        dense = dense or prediction
        yield _outcome(case, name, prediction, layers, dense)


def prefill(
    model: Any, document: Document, attention: Attention, advance: Callable[[], None]
) -> tuple[Prediction, list[Work]]:
    """One prefill with a method's attention: what it predicts, and the work of each layer.

    Layers with a mask of their own, as a window is, attend as in the model: methods choose among all earlier keys.

    Raises:
        UsageError: No attention of the model is plain causal SDPA.
    """
    layers: list[Work] = []
    device = next(model.parameters()).device

    def handle(call: SdpaInputs) -> torch.Tensor:
        if not call.is_plain:
            advance()
            return call.dense()
        synchronize(device)
        start = time.perf_counter()
        attended: Attended = attention(read_call(call))
        advance()
        layers.append(Work(attended.density, attended.ranking, attended.seconds, time.perf_counter() - start))
        return attended.output[None]

    with SdpaIntercept(handle):
        prediction = predict(model, document, device)
    if not layers:
        name = type(model).__name__
        raise UsageError(f"{name} does not call SDPA for causal attention to all keys, so none can be replaced.")
    return prediction, layers


def _outcome(case: Case, method: str, prediction: Prediction, layers: list[Work], dense: Prediction) -> Outcome:
    document = case.document
    times = [layer.seconds for layer in layers if layer.seconds is not None]
    is_timed = len(times) == len(layers)
    beside = prediction.seconds - sum(layer.wall for layer in layers)
    spans = dict(zip(PLACES, (document.middle, document.end), strict=True))
    return Outcome(
        method,
        case.task,
        case.length,
        case.sample,
        prediction.seconds,
        statistics.fmean(layer.density for layer in layers),
        statistics.fmean(layer.ranking for layer in layers),
        scored=len(document.scored),
        loss=sum(prediction.loss[i] for i in document.scored),
        agreed=sum(prediction.best[i] == dense.best[i] for i in document.scored),
        found={place: prediction.found(document, values) for place, values in spans.items()},
        nats={place: [sum(prediction.loss[i] for i in value) for value in values] for place, values in spans.items()},
        depths=case.depths,
        prefill_seconds=beside + sum(times) if is_timed else None,
        attention_seconds=sum(times) if is_timed else None,
    )
