"""The attention backend for CPUs, which tests how vLLM's batches are taken apart; it is not made to be fast.

vLLM's own attention there keeps keys in an order of the CPU's instructions, which no other can read. So this one keeps
them as they are, and its dense attention reads them as its sparse one does.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from ...ops import S2OConfig
from ...ops.dispatch import DENSE_AT_ANY_LENGTH
from .sparse import SparseBuilder, SparseImpl


class PlainCPUAttentionImpl(CPUAttentionBackendImpl):
    """Dense attention to a cache [blocks, Hkv, block size, 2 D], a key and its value side by side."""

    arguments: dict[str, Any]

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Store keys and values [T, Hkv, D] in their slots; those of tokens that pad a batch are below 0."""
        tokens = (slot_mapping >= 0).nonzero().flatten()
        slots, size = slot_mapping[tokens].long(), kv_cache.shape[2]
        kv_cache[slots // size, :, slots % size] = torch.cat([key[tokens], value[tokens]], -1)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> torch.Tensor:
        """Write the attention of all requests to `output` [T, Hq, D]."""
        if attn_metadata is None:
            return output
        pages, starts, keys = kv_cache.transpose(1, 2), attn_metadata.query_start_loc, attn_metadata.seq_lens
        torch.ops.s2o.attention_varlen_out(
            output, query, pages[..., : self.head_size], pages[..., self.head_size :], starts, None,
            int(starts.diff().max()), int(keys.max()), seqused_k=keys, block_table=attn_metadata.block_table,
            sinks=self.sinks, **self.arguments, **S2OConfig(min_length=DENSE_AT_ANY_LENGTH).arguments(),
        )  # fmt: skip
        return output


class S2OCPUAttentionMetadataBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """Prepares a step."""


class S2OCPUAttentionImpl(SparseImpl, PlainCPUAttentionImpl):
    """Sparse for long requests, and else dense."""


class S2OCPUAttentionBackend(CPUAttentionBackend):
    """In the place of vLLM's own, whose name it has."""

    @staticmethod
    def get_impl_cls() -> type[S2OCPUAttentionImpl]:
        """The class of one layer's attention."""
        return S2OCPUAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[S2OCPUAttentionMetadataBuilder]:
        """The class that prepares a step."""
        return S2OCPUAttentionMetadataBuilder

    @classmethod
    def supports_sink(cls) -> bool:
        """Yes, as on a GPU."""
        return True
