"""Inputs to attention that have structure, made without a model."""

from __future__ import annotations

import torch


def structured(
    length: int,
    heads: int,
    groups: int,
    channels: int,
    device: str,
    dtype: torch.dtype,
    sharpness: float = 3.2,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query [1, heads, length, channels], key and value [1, groups, length, channels].

    Keys and values are standard normal. Queries follow a topic that changes every 256 positions and is shared by the
    heads of a KV group, plus noise of their own; `sharpness` is the standard deviation of the logits, so that a few
    keys stand out for each topic, others for each query, and the rest is a flat tail. The first key is a sink.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    topics = normal(1, groups, 1, -(-length // 256), channels).repeat_interleave(256, 3)[:, :, :, :length]
    noise = normal(1, groups, heads // groups, length, channels)
    query = sharpness * (0.97 * topics + 0.24 * noise).flatten(1, 2)
    key, value = normal(1, groups, length, channels), normal(1, groups, length, channels)
    key[:, :, 0] = 0
    return query.to(dtype), key.to(dtype), value.to(dtype)
