"""Alike queries merged: few guides that stand for all queries of a head, chosen so that none is far from its own.

Neighbouring queries often want the same keys. How much two of them differ is measured in logits: the standard deviation
over keys of the difference, d(x, y)^2 = scale^2 (x - y) C (x - y)' with the covariance C of the keys. Farthest-first
traversal (Gonzalez, Clustering to minimize the maximum intercluster distance, 1985) adds centres until every query lies
within a radius of one, so that the number of guides follows from how much queries really differ. A guide is the mean of
the queries that are closest to a centre. Its `reach`, the largest distance of a member, is added to its logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

MERGED = 32
"""Consecutive positions whose queries may be merged."""


class Clusters(NamedTuple):
    """Clusters of n queries; those from `number` on are empty.

    Attributes:
        owner: The cluster of each query [..., n], int64; 0 for those that are not real.
        number: How many clusters there are [...], int64.
        reach: The largest distance of a member from the mean [..., n], float32 or float64.
        first: The first member [..., n], int64; n for empty clusters.
    """

    owner: torch.Tensor
    number: torch.Tensor
    reach: torch.Tensor
    first: torch.Tensor

    def means(self, x: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """The mean over each cluster of what belongs to its `real` [..., n] queries [..., n, D]; 0 for empty ones.

        NaN and infinities make all means of the n queries NaN.
        """
        cluster = torch.arange(self.owner.shape[-1], device=x.device)[:, None]
        is_member = ((self.owner[..., None, :] == cluster) & real[..., None, :]).to(x.dtype)
        x = x if real.all() else torch.where(real[..., None], x, 0)
        return is_member / is_member.sum(-1, keepdim=True).clamp_min(1) @ x


def find_clusters(query: torch.Tensor, real: torch.Tensor, covariance: torch.Tensor, radius: float) -> Clusters:
    """Clusters of alike queries.

    Args:
        query: [..., n, D], with the scale of the logits in it.
        real: Which of them count [..., n], broadcastable.
        covariance: Of the keys [D, D], or a factor for each KV head, broadcastable.
        radius: Distance from a centre within which a query joins it.
    """
    apart, central = _distances(query, real, covariance)
    owner = torch.zeros(apart.shape[:-1], dtype=torch.int64, device=query.device)
    nearest = torch.where(real, math.inf, 0).to(apart.dtype).expand(owner.shape)
    count = owner.new_zeros(owner.shape[:-1])
    farthest = central
    for number in range(owner.shape[-1]):
        goes_on = nearest.amax(-1) > radius**2
        if not goes_on.any():
            break
        distance = apart.gather(-2, farthest[..., None, None].expand(*farthest.shape, 1, apart.shape[-1])).squeeze(-2)
        closer = goes_on[..., None] & (distance < nearest)
        owner.masked_fill_(closer, number)
        nearest = torch.where(closer, distance, nearest)
        count += goes_on
        farthest = nearest.argmax(-1)
    return Clusters(owner, count, *_extent(apart, owner, real))


def _distances(query: torch.Tensor, real: torch.Tensor, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Squares of the distances of all pairs [..., n, n], 0 for pairs that are not real; the query closest to all.

    From the first of them on, queries are small, and differences of their products exact enough.
    """
    shifted = query - query[..., :1, :]
    gram = shifted @ covariance @ shifted.mT
    square = gram.diagonal(dim1=-2, dim2=-1)
    apart = (square[..., :, None] + square[..., None, :]).sub_(gram, alpha=2).clamp_min_(0).nan_to_num_(0)
    apart.masked_fill_(~(real[..., None] & real[..., None, :]), 0)
    return apart, apart.sum(-1).masked_fill(~real, math.inf).argmin(-1)


def _extent(apart: torch.Tensor, owner: torch.Tensor, real: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`Clusters.reach` and `Clusters.first`.

    A member's squared distance from the mean is its mean squared distance from the members, less half of the mean of
    these (Huygens and Steiner).
    """
    together = ((owner[..., :, None] == owner[..., None, :]) & real[..., None, :]).to(apart.dtype)
    size = together.sum(-1).clamp_min(1)
    from_members = (together * apart).sum(-1) / size
    square = from_members - (together @ from_members[..., None])[..., 0] / (2 * size)
    distance = square.clamp_min(0).sqrt().masked_fill(~real, 0)
    reach = torch.zeros_like(distance).scatter_reduce_(-1, owner, distance, "amax")
    queries = owner.shape[-1]
    place = torch.where(real, torch.arange(queries, device=owner.device), queries).expand_as(owner)
    return reach, torch.full_like(owner, queries).scatter_reduce_(-1, owner, place, "amin")
