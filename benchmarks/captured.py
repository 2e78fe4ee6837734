"""Attention inputs of one layer in a safetensors file.

Tensors `q` [Hq, L, D], `k` [Hkv, L, D] and `v` [Hkv, L, Dv]; a file with a single KV head may leave that axis out.
The file's metadata are the facts of the capture; without a `scale` among them it is D ** -0.5.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from s2o_compile._console import UsageError
from s2o_compile.writing import replacing


@dataclass(frozen=True)
class Layer:
    """What one layer attends, causally, over one sequence.

    Attributes:
        name: For reports.
        query: [Hq, L, D].
        key: [Hkv, L, D], Hq a multiple of Hkv.
        value: [Hkv, L, Dv].
        scale: Factor of the logits.
        facts: Where it comes from.
    """

    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.query)

    @property
    def length(self) -> int:
        """Positions."""
        return self.query.shape[1]

    def head(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [L, D], key [L, D] and value [L, Dv] of one query head."""
        group = index // (self.heads // len(self.key))
        return self.query[index], self.key[group], self.value[group]

    def group(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [G, L, D], key [L, D] and value [L, Dv] of one KV head, G query heads."""
        return self.query.unflatten(0, (len(self.key), -1))[index], self.key[index], self.value[index]

    def first(self, length: int) -> Layer:
        """The first `length` positions."""
        return replace(self, **{name: getattr(self, name)[:, :length] for name in ("query", "key", "value")})


def save_layer(layer: Layer, path: Path) -> None:
    """Write a layer and its facts."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    facts = layer.facts | {"scale": repr(layer.scale)}
    tensors = {"q": layer.query, "k": layer.key, "v": layer.value}
    with replacing(path) as place:
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, place, facts)
        except SafetensorError as error:
            raise UsageError(f"The capture {path} cannot be written: {error}.") from error


def load_layer(path: Path, device: torch.device | str = "cpu") -> Layer:
    """Read a layer, in float32.

    Raises:
        UsageError: The file cannot be read or does not hold attention inputs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt", str(device)) as file:
            facts, names = file.metadata() or {}, set(file.keys())
            if not names >= {"q", "k", "v"}:
                raise UsageError(
                    f"The capture {path} must hold the tensors q, k and v, not {', '.join(sorted(names))}."
                )
            query, key, value = (file.get_tensor(name).float() for name in "qkv")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"The capture {path} cannot be read as safetensors: {error}.") from error
    if key.dim() == 2:
        key, value = key[None], value[None]
    if not _fit(query, key, value):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", query), ("k", key), ("v", value)))
        raise UsageError(f"The capture {path} must hold q [Hq, L, D], k [Hkv, L, D] and v [Hkv, L, Dv], not {shapes}.")
    scale = float(facts.get("scale", query.shape[-1] ** -0.5))
    return Layer(path.stem, query, key, value, scale, facts)


def _fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    if not query.dim() == key.dim() == value.dim() == 3:
        return False
    lengths = {x.shape[1] for x in (query, key, value)}
    return len(lengths) == 1 and key.shape[2] == query.shape[2] and not len(query) % len(key) and len(key) == len(value)
