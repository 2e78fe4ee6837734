"""Inputs to attention that have structure, made without a model, and as diffuse as a density asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOPIC = 256
"""Positions that share a topic."""
SHARPNESS = (6.0, 2.75)
"""The standard deviation of the logits, where queries are least and most diffuse."""
LIKENESS = (1.0, 0.1)
"""The share of a query's variance that is its topic, where queries are least and most diffuse."""


@dataclass(frozen=True)
class Structure:
    """What queries are made of, and the keys and values they attend.

    All are standard normal. A query of diffuseness d, from 0 to 1, is sharpness * (sqrt(likeness) * topic + sqrt(1 -
    likeness) * noise), where sharpness and likeness go evenly from one end to the other of `SHARPNESS` and `LIKENESS`.
    Topics change every `TOPIC` positions and are shared by the query heads of a KV head, noise is each query's own. So
    a softmax is log-normal over keys that lie anywhere in the history: at 0 the queries of a segment agree on few keys
    that hold all the mass, at 1 each spreads its mass over more keys, most of them its own. What a sparse method visits
    of that grows with d, whichever its rule.

    Attributes:
        topics: [1, Hkv, 1, topics, D].
        noise: [1, Hkv, Hq / Hkv, L, D].
        key: [1, Hkv, L, D].
        value: [1, Hkv, L, D].
    """

    topics: torch.Tensor
    noise: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @classmethod
    def draw(
        cls,
        length: int,
        heads: int,
        kv_heads: int,
        channels: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Structure:
        """Of `length` positions, `heads` query heads over `kv_heads` KV heads; `channels` is D."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, channels, generator=generator, device=device, dtype=dtype)

        return cls(
            normal(1, kv_heads, 1, -(-length // TOPIC)),
            normal(1, kv_heads, heads // kv_heads, length),
            normal(1, kv_heads, length),
            normal(1, kv_heads, length),
        )

    @property
    def length(self) -> int:
        """Positions."""
        return self.key.shape[2]

    def query(self, diffuseness: float, rows: slice = slice(None)) -> torch.Tensor:
        """The queries [1, Hq, rows, D] of a diffuseness from 0 to 1."""
        sharpness, likeness = (low + diffuseness * (high - low) for low, high in (SHARPNESS, LIKENESS))
        topic = torch.arange(self.length, device=self.key.device)[rows] // TOPIC
        shared = self.topics[:, :, :, topic] * (sharpness * likeness**0.5)
        own = self.noise[:, :, :, rows]
        return torch.add(shared, own, alpha=sharpness * (1 - likeness) ** 0.5).flatten(1, 2)
