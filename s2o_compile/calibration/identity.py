"""Which model a calibration is for: what can be compared cheaply, in a model or in a part of its graph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses import FakeTensor
from torch.fx import GraphModule

from ..ops.distributed import is_dtensor
from ..passes.graph.torch_internals import input_sources
from ..passes.report import module_path

_SAMPLED = 256


@dataclass(frozen=True)
class Identity:
    """A model, as far as it is told from others.

    Attributes:
        kind: The name of its class.
        parameters: How many numbers its parameters have.
        weights: Digests of one weight for each attention site, by name.
    """

    kind: str
    parameters: int
    weights: dict[str, str]

    @classmethod
    def of(cls, model: torch.nn.Module, sites: Iterable[str]) -> Identity:
        """The identity of a model with these attention sites."""
        parameters = dict(model.named_parameters())
        chosen = dict.fromkeys(_weight_near(site, parameters) for site in sites) if parameters else {}
        count = sum(parameter.numel() for parameter in parameters.values())
        return cls(type(model).__name__, count, {name: digest(parameters[name]) for name in chosen})

    def __str__(self) -> str:
        return f"a {self.kind} of {self.parameters:,} parameters with weights {_short(str(self.weights))}"

    def mismatch(self, weights: dict[str, torch.Tensor]) -> str | None:
        """The first of the weights that is not the one of the same name in this model; None if all are."""
        shared = (name for name in self.weights if name in weights)
        return next((name for name in shared if digest(weights[name]) != self.weights[name]), None)


def digest(weight: torch.Tensor) -> str:
    """A checksum of the shape and of up to 256 evenly spread elements, the same in float32 and bfloat16.

    Of a DTensor it is that of the whole, which all ranks have to ask for.
    """
    weight = weight.detach()
    if is_dtensor(weight):
        weight = weight.full_tensor()  # type: ignore[attr-defined]
    flat = weight.reshape(-1)
    count = min(_SAMPLED, len(flat))
    sample = flat[torch.arange(count, device=flat.device) * len(flat) // max(1, count)]
    return _short(f"{list(weight.shape)} {sample.bfloat16().tolist()}")


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def graph_weights(module: GraphModule, inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The weights that a graph of Dynamo or of an export holds, by their names in the model."""
    named = zip(map(module_path, input_sources(module.graph)), inputs, strict=False)
    found = {name: value for name, value in named if isinstance(value, torch.nn.Parameter)}
    found |= dict(module.named_parameters())
    return {name: value for name, value in found.items() if not (isinstance(value, FakeTensor) or value.is_meta)}


def _weight_near(site: str, parameters: Iterable[str]) -> str:
    """The first parameter in the module of a site, or in the innermost module around it that has any."""
    while site:
        inside = next((name for name in parameters if name.startswith(f"{site}.")), None)
        if inside is not None:
            return inside
        site = site.rpartition(".")[0]
    return next(iter(parameters))
