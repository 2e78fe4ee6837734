"""The ways to run a model that are compared."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2o_compile.backend import s2o
from s2o_compile.integrations.settings import configure
from s2o_compile.ops import S2OConfig
from s2o_compile.ops.dispatch import DENSE_AT_ANY_LENGTH
from s2o_compile.testbed.options import check_names

from .calls import Call

CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
DENSE = S2OConfig(min_length=DENSE_AT_ANY_LENGTH)
EAGER, INDUCTOR, KEPT_DENSE, S2O = BACKENDS = ("eager", "inductor", "s2o, kept dense", "s2o")
ONE_LENGTH = "inductor, one length"
"""Inductor, compiled for each length, beside those that are compiled once for all."""
EAGER_FLASH, EAGER_S2O, NO_ATTENTION = "eager, FlashAttention", "eager, s2o", "eager, no attention"
"""SDPA by FlashAttention alone, the operator as transformers calls it, and zeros in the place of attention."""
UNCOMPILED = (EAGER, EAGER_FLASH, EAGER_S2O, NO_ATTENTION)
KNOWN = (*UNCOMPILED, INDUCTOR, ONE_LENGTH, KEPT_DENSE, S2O)
_ZEROS = "s2o_benchmark_zeros"


def choose_backends(names: Sequence[str]) -> tuple[str, ...]:
    """The backends of these names, in the order of rows; `BACKENDS` where there are none.

    Raises:
        UsageError: A name is unknown.
    """
    check_names("--only", names, KNOWN)
    return tuple(name for name in KNOWN if name in names) or BACKENDS


class Contender:
    """A model run in one way.

    Args:
        model: A causal language model of transformers.
        backend: One of `KNOWN`.
        config: Settings of the operator, for `S2O` and `EAGER_S2O`.
        dynamic: Whether it is compiled for all lengths.
    """

    def __init__(self, model: Any, backend: str, config: S2OConfig, dynamic: bool) -> None:
        self._s2o = {S2O: s2o.with_config(config), KEPT_DENSE: s2o.with_config(DENSE)}.get(backend)
        self._model, self._is_flash = model, backend == EAGER_FLASH
        if backend in (EAGER_S2O, NO_ATTENTION):
            self._model = _attending(model, config if backend == EAGER_S2O else None)
        elif backend not in UNCOMPILED:
            compiler = self._s2o or "inductor"
            self._model = torch.compile(model, backend=compiler, dynamic=dynamic and backend != ONE_LENGTH)

    def __call__(self, call: Call) -> list[int]:
        """Prefill; the most likely next token of each prompt, on the host."""
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if self._is_flash else nullcontext():
            return [token for inputs in call.inputs for token in first_tokens(self._model, inputs)]

    @property
    def sites(self) -> str:
        """What became of the attention sites, in all graphs, such as "30 sparse"; "" without s2o, or not yet called."""
        decisions = self._s2o.report.decisions if self._s2o else []
        kinds = Counter(kind for _, kind in {(decision.name, decision.kind): None for decision in decisions})
        return "; ".join(f"{count} {kind}" for kind, count in kinds.items())


class Contenders:
    """A model and the ways to run it that are compared.

    Args:
        model: A causal language model of transformers.
        backends: Of `KNOWN`.
        dynamic: Whether what is compiled serves all lengths; else it is compiled for each.

    Attributes:
        model: As given.
        backends: As given.
    """

    def __init__(self, model: Any, backends: Sequence[str] = BACKENDS, dynamic: bool = False) -> None:
        self.model, self.backends, self._dynamic = model, backends, dynamic
        self._made: dict[Any, Contender] = {}

    def begin_length(self) -> None:
        """Forget what was compiled for other lengths alone."""
        if not self._dynamic:
            torch.compiler.reset()
            self._made.clear()

    def get(self, backend: str, call: Call, config: S2OConfig) -> Contender:
        """The model run in one way for calls of one name; one that is compiled already, where there is such a one."""
        key = backend, call.name, config if backend in (S2O, EAGER_S2O) else None
        if key not in self._made:
            self._made[key] = Contender(self.model, backend, config, self._dynamic or call.is_dynamic)
        return self._made[key]


def _attending(model: Any, config: S2OConfig | None) -> Any:
    """A copy of a model, with the same weights, whose attention is the operator with a configuration, or zeros."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    shared = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    if config is not None:
        shared.set_attn_implementation("s2o")
        configure(shared, config)
        return shared
    AttentionInterface.register(_ZEROS, _zeros)
    AttentionMaskInterface.register(_ZEROS, sdpa_mask)
    shared.set_attn_implementation(_ZEROS)
    return shared


def _zeros(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """Of attention's shape, as ``transformers.AttentionInterface`` calls it."""
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


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
