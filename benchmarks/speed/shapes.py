"""The attention of well-known models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Query heads, KV heads, head dimension, and the mask."""

    heads: int
    kv_heads: int
    channels: int
    is_causal: bool = True

    def __str__(self) -> str:
        mask = "causal" if self.is_causal else "bidirectional"
        return f"{self.heads}/{self.kv_heads}/{self.channels}, {mask}"


SHAPES = {
    "llama-3.1-8b": Shape(32, 8, 128),
    "llama-3.2-1b": Shape(32, 8, 64),
    "qwen2.5-7b": Shape(28, 4, 128),
    "gemma-2-9b": Shape(16, 8, 256),
    "phi-3": Shape(32, 32, 96),
    "smollm2": Shape(9, 3, 64),
    "video-dit": Shape(24, 24, 128, is_causal=False),
}
"""By name; Gemma 2's soft cap and Phi 3's window are left out, as no dense backend but FlexAttention has them."""
