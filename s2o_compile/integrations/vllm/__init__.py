"""Sparse prefill in vLLM, as a plugin: ``vllm serve MODEL --attention-backend CUSTOM`` (docs/serving.md)."""

from __future__ import annotations

import os

VARIABLE = "S2O_VLLM_CPU"
"""The environment variable that puts this attention in the place of vLLM's own on a CPU, where none can be chosen."""


def register() -> None:
    """Tell vLLM where the attention is; each process of an engine calls this, perhaps more than once."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.cuda.S2OAttentionBackend")
    if os.environ.get(VARIABLE) == "1":
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.S2OCPUAttentionBackend")
