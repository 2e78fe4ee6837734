"""QuoKA (arXiv 2602.08722): keys by the cosine to those queries of a chunk that are least like their mean.

No code is published. The abstract and reviews give the three steps that are here: queries with the lowest cosine to the
chunk's mean query are kept; their cosines with all earlier keys are averaged over the query heads of a KV head and the
largest over the queries is taken; the chunk attends to the best keys and to its own. How many queries are kept could
not be read: an eighth of a chunk is this project's choice. Averages pair the heads' queries by their rank. Nothing is
known of crutches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.functional import normalize

from .group import Group
from .visit import Visit

KEPT = 0.12
"""Share of the earlier keys: 88% fewer, as published."""
CHUNK = 128
QUERIES = CHUNK // 8


def quoka(group: Group, kept: Sequence[float]) -> Iterator[list[Visit]]:
    """Visit the earlier keys that are most like the chunk's unlike queries, and the chunk's own.

    Args:
        group: The query heads of a KV head.
        kept: Shares of the keys before a chunk.
    """
    length, device = len(group.key), group.key.device
    starts = range(0, length, CHUNK)
    unit_keys = normalize(group.key, dim=-1)
    scores = [(unlike(group.query[:, start : start + CHUNK]) @ unit_keys[:start].T).amax(0) for start in starts[1:]]
    first = torch.tensor(starts, device=device)[:, None]
    positions = torch.arange(length, device=device)
    own = (positions >= first) & (positions < first + CHUNK)
    products = 2 * QUERIES * group.key.shape[1] * sum(starts) / len(group.query)
    for share in kept:
        mask = own.clone()
        for row, score in enumerate(scores, 1):
            mask[row, score.topk(int(share * len(score))).indices] = True
        yield [Visit(mask, CHUNK, 1, products)] * len(group.query)


def unlike(query: torch.Tensor) -> torch.Tensor:
    """The directions of the queries [G, C, D] least like their head's mean, averaged over heads: [QUERIES, D]."""
    unit = normalize(query, dim=-1)
    likeness = (unit @ normalize(query.mean(1, keepdim=True), dim=-1).mT)[..., 0]
    index = likeness.topk(min(QUERIES, query.shape[1]), dim=-1, largest=False).indices
    return unit.gather(1, index[..., None].expand(-1, -1, query.shape[2])).mean(0)
