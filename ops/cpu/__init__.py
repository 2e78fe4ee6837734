"""The implementation in torch operations batched over tiles: `rank` lists the keys, `attend` visits them.


It is written for CPUs, and runs on any device: on a GPU, for the rules that have no Triton kernels.
"""

from .pipeline import sparse_attention
from .trace import SegmentTrace, trace_head

__all__ = ["SegmentTrace", "sparse_attention", "trace_head"]
