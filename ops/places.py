"""Where the keys and values of a call are, if they do not follow one another."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Places(NamedTuple):
    """The rows of the keys of a call, and of their values, in memory that holds others beside them.

    Key and value are the first rows of that memory, as many as there are keys, so that shape and strides are theirs.

    Attributes:
        rows: [Lk] int32, the row of each key, in the order of keys.
        total: How many rows there are.
    """

    rows: torch.Tensor
    total: int

    def ordered(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values [1, Hkv, Lk, D] copied into their order."""
        _, heads, _, channels = x.shape
        all_rows = x.as_strided((self.total, heads, channels), [x.stride(n) for n in (2, 1, 3)])
        return all_rows.index_select(0, self.rows).transpose(0, 1)[None]
