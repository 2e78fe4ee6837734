"""The ways to run a model that are compared."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2o_compile.backend import S2OBackend, s2o
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH

from .calls import Call

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
EAGER, INDUCTOR, KEPT_DENSE, S2O = BACKENDS = ("eager", "inductor", "s2o, kept dense", "s2o")


class Contender:
    """A model run in one way, on the prompts of one call.

    Attributes:
        backend: One of `BACKENDS`.
    """

    def __init__(self, model: Any, backend: str, call: Call, config: S2OConfig) -> None:
        self.backend, self._call, self._s2o = backend, call, _backend(backend, config)
        self._model = model
        if backend != EAGER:
            compiler = self._s2o or "inductor"
            self._model = torch.compile(model, backend=compiler, dynamic=call.is_dynamic)

    def __call__(self) -> list[int]:
        """Prefill; the most likely next token of each prompt, on the host."""
        return [token for inputs in self._call.inputs for token in first_tokens(self._model, inputs)]

    @property
    def sites(self) -> str:
        """What became of the attention sites, in all graphs, such as "30 sparse"; "" without s2o, or not yet called."""
        decisions = self._s2o.report.decisions if self._s2o else []
        kinds = Counter(kind for _, kind in {(decision.name, decision.kind): None for decision in decisions})
        return "; ".join(f"{count} {kind}" for kind, count in kinds.items())


def _backend(name: str, config: S2OConfig) -> S2OBackend | None:
    if name == KEPT_DENSE:
        config = dataclasses.replace(config, min_length=DENSE_AT_ANY_LENGTH)
    return s2o.with_config(config) if name in (KEPT_DENSE, S2O) else None


@torch.no_grad()
def first_tokens(model: Callable[..., Any], inputs: dict[str, Any]) -> list[int]:
    """The most likely next token of each sequence, on the host."""
    return model(**inputs).logits[:, -1].argmax(-1).tolist()


@contextmanager
def preferring(backends: list[SDPBackend]) -> Iterator[None]:
    """In it SDPA prefers these backends, the first most, compiled or not; without any, in PyTorch's own order."""
    if not backends:
        yield
        return
    # Caches of compilations do not know the preference: without a tag of its own, later ones would take over this.
    tag = torch.compiler.config.patch(cache_key_tag=f"prefers {backends}")  # type: ignore[attr-defined]
    with tag, sdpa_kernel(backends, set_priority=True):
        yield
