"""The CPU implementation, in torch operations batched over tiles: `rank` lists the keys, `attend` visits them."""

from .launch import sparse_attention
from .trace import SegmentTrace, trace_head

__all__ = ["SegmentTrace", "sparse_attention", "trace_head"]
