"""What is timed: functions of query [1, Hq, L, D], key and value [1, Hkv, L, D]."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile._attention import attention
from s2o_compile.ops import AttentionResult, S2OConfig

Dense = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Sparse = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], AttentionResult]

PRESETS = {
    "default": "",
    "pool 2": "pool=2 sample=64 measure=output threshold=6e-3",
    "pool 4": "pool=4 channels=None threshold=1e-3",
    "packed": "pool=8 guides=kv_head channels=None combine=mean rule=dropped near_keys=128 threshold=2e-5",
}
"""Settings of the operator: its own, guides of 2 queries in half the channels, of 4 in all, and 4 guides for each 32
positions of a KV head."""


def sdpa(backend: SDPBackend, is_causal: bool) -> Dense:
    """One backend of SDPA."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True)

    return run


def flex(is_causal: bool) -> Dense:
    """FlexAttention, compiled; it skips the blocks that the causal mask hides."""
    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def mask(length: int, device: torch.device) -> BlockMask | None:
        # Not compiled, this takes length * length bytes.
        make = torch.compile(create_block_mask)
        return make(_causal, None, None, length, length, device=device) if is_causal else None

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return compiled(query, key, value, block_mask=mask(query.shape[2], query.device), enable_gqa=True)

    return run


def _causal(batch: torch.Tensor, head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    return column <= row


DENSE: dict[str, Callable[[bool], Dense]] = {
    "cudnn": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "flex": flex,
}
"""Dense attention by name, made for a causal mask or for none."""


def sparse(config: S2OConfig, is_causal: bool) -> Sparse:
    """The operator."""

    def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> AttentionResult:
        return attention(query, key, value, is_causal, config=config, return_stats=True)

    return run
