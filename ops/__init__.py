"""The operator: schema, validation, reference, CPU and Triton implementations."""

from .config import Ranking, S2OConfig
from .context import attention_context, attention_context_stats
from .operator import attention, attention_stats
from .result import AttentionResult
from .varlen import attention_varlen

__all__ = [
    "AttentionResult",
    "Ranking",
    "S2OConfig",
    "attention",
    "attention_context",
    "attention_context_stats",
    "attention_stats",
    "attention_varlen",
]
