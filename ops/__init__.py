"""The operator: schema, validation, reference, CPU and Triton implementations."""

from .config import Ranking, S2OConfig
from .operator import attention, attention_stats
from .result import AttentionResult

__all__ = ["AttentionResult", "Ranking", "S2OConfig", "attention", "attention_stats"]
