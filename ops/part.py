"""What a call knows of a sequence of which it has all keys and some queries, so that it chooses as a call of all would.

Where it chooses by its keys, it has them. Where it chooses by queries, it does by a sample of them; so a call that is
given that of the whole sequence chooses, bit for bit, what a call of the whole sequence does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .places import Places
from .rule.output_weighting import sampled_rows
from .visibility import Visibility


class SampledQueries(NamedTuple):
    """The queries of a sequence from which the size of its outputs is estimated.

    Attributes:
        query: [B, Hq, n, D].
        rows: Their positions among the queries of the sequence [n].
        visibility: The mask of the sequence.
    """

    query: torch.Tensor
    rows: torch.Tensor
    visibility: Visibility

    @classmethod
    def of(cls, query: torch.Tensor, kv_heads: int, visibility: Visibility) -> SampledQueries:
        """Those of a call of the whole sequence, query [B, Hq, Lq, D]."""
        rows = sampled_rows(query.shape[2], query.shape[1] // kv_heads, query.device)
        return cls(query[:, :, rows], rows, visibility)


class Part(NamedTuple):
    """What is handed to a call whose queries are a part of those of a sequence; None for what does not matter there.

    Attributes:
        guides: Every so many of the pooled queries of the sequence, as `rule.channels.sampling_step` says
            [B, Hkv, G or 1, n, D]. Of so few, a step of 1 takes all.
        outputs: Its queries that say how large outputs are.
        places: Where keys and values are; None where they follow one another. Then there is one batch entry.
        arrive: Lets what the device does from then on wait for the values, which may still travel; as often as called.
    """

    guides: torch.Tensor | None = None
    outputs: SampledQueries | None = None
    places: Places | None = None
    arrive: Callable[[], Any] = lambda: None

    def of(self, batch: slice) -> Part:
        """The same of some batch entries."""
        guides, outputs = self.guides, self.outputs
        if outputs is not None:
            outputs = outputs._replace(query=outputs.query[batch], visibility=outputs.visibility.of(batch))
        return self._replace(guides=None if guides is None else guides[batch], outputs=outputs)
