"""The CPU implementation, in torch operations batched over tiles: `rank` lists the keys, `attend` visits them."""

from .launch import sparse_attention

__all__ = ["sparse_attention"]
