"""The operator: schema, validation, reference, CPU and Triton implementations."""

from .config import S2OConfig
from .operator import attention, attention_stats
from .result import AttentionResult

__all__ = ["AttentionResult", "S2OConfig", "attention", "attention_stats"]
