"""The attention backend for GPUs, on vLLM's Triton attention, which runs on all of them and has sinks and soft caps."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from .sparse import KV_CACHE_DTYPES, SparseBuilder, SparseImpl


class S2OAttentionMetadataBuilder(SparseBuilder, TritonAttentionMetadataBuilder):
    """Triton attention may be captured in CUDA graphs with any batch; here only batches that decode may."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        # Requests that decode come first, so that they are one run.
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)


class S2OAttentionImpl(SparseImpl, TritonAttentionImpl):
    """Sparse for long requests, and else Triton attention."""


class S2OAttentionBackend(TritonAttentionBackend):
    """What ``--attention-backend CUSTOM`` chooses."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(KV_CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """The name of the slot: vLLM looks it up among its own."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[S2OAttentionImpl]:
        """The class of one layer's attention."""
        return S2OAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[S2OAttentionMetadataBuilder]:
        """The class that prepares a step."""
        return S2OAttentionMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders alone."""
        return bool(attn_type == AttentionType.DECODER)

    @classmethod
    def supports_non_causal(cls) -> bool:
        """No: what is long is causal."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """No: no query sees later ones."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """No: windows hide prompts too."""
        return False

    @classmethod
    def supports_alibi_sqrt(cls) -> bool:
        """No biases by position."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """No: what a prompt gets depends on where it is cut."""
        return False
