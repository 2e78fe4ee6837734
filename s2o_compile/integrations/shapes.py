"""The shapes of attention in a model of transformers, from its configuration."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..ops.validation import MAX_HEAD_DIM

_MANY_HEADS = 128
"""Where a configuration does not say: more than models have, so that nothing is kept dense that could be sparse."""


class Shapes(NamedTuple):
    """Of query [B, Hq, Lq, D], key [B, Hkv, Lk, D] and value [B, Hkv, Lk, Dv]."""

    query: tuple[int, int, int, int]
    key: tuple[int, int, int, int]
    value: tuple[int, int, int, int]


def attention_shapes(config: Any, batch: int, queries: int, keys: int) -> Shapes:
    """The shapes of a layer's call; of a model whose layers differ, those of the largest.

    Args:
        config: The configuration of the model, or None.
        batch: B.
        queries: Lq.
        keys: Lk.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = _largest(config, "num_attention_heads") or _MANY_HEADS
    kv_heads = _largest(config, "num_key_value_heads") or heads
    width = _largest(config, "qk_head_dim") or _largest(config, "head_dim")
    width = width or _largest(config, "hidden_size") // heads or MAX_HEAD_DIM
    value_width = _largest(config, "v_head_dim") or width
    return Shapes((batch, heads, queries, width), (batch, kv_heads, keys, width), (batch, kv_heads, keys, value_width))


def _largest(config: Any, name: str) -> int:
    """A number of a configuration, or of one a layer the largest; 0 where there is none."""
    found = getattr(config, name, None)
    numbers = found if isinstance(found, (list, tuple)) else [found]
    return max((number for number in numbers if isinstance(number, int)), default=0)
