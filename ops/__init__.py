"""The operator: schema, validation, reference, CPU and Triton implementations."""

from .config import Ranking, S2OConfig
from .operator import attention, attention_stats
from .result import AttentionResult
from .varlen import attention_varlen

__all__ = ["AttentionResult", "Ranking", "S2OConfig", "attention", "attention_stats", "attention_varlen"]
