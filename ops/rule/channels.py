"""Ranking in fewer channels: guides and keys in the directions that carry most of their products.

For half the channels or more, those of most energy do as well as any directions; for fewer, subspace iteration is used.
"""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch

from ..visibility import masked

NEGLECT_LIMIT = 2.0
"""The variance of logits up to which channels are dropped; above it all channels cost less than the extra keys."""
_ROWS = 2**11
"""The number of guides and keys that the directions are found from, about."""
_SLACK = 1e-10
"""Of a Gram matrix in double precision, relative to its diagonal: far above roundings, which then decide nothing."""
_EPSILON = 1e-60
"""Keeps matrices of zeros from being divided by zero."""


class Projected(NamedTuple):
    """Guides [..., G, n, channels] and keys [..., Lk, channels], and how much their products miss.

    `neglected` [...] is the variance over keys of the logit's residual from the dropped channels, in the mean over
    guides, float64; None where nothing is missing. Where logits are off by a normal variable of variance s, a key is
    taken for too small as often as for too large, and the former costs more: importance is multiplied by e^s to make up
    for it.
    As measured, errors are then at most those of all channels at the same threshold, and density pays for what is
    neglected (docs/decisions/003-half-the-channels.md). Where that is more than `NEGLECT_LIMIT`, all channels are
    scored instead.
    """

    guides: torch.Tensor
    key: torch.Tensor
    neglected: torch.Tensor | None

    @property
    def neglects_too_much(self) -> torch.Tensor:
        """Whether too much is `neglected`: [...] boolean."""
        if self.neglected is None:
            return torch.zeros(self.key.shape[:-2], dtype=torch.bool, device=self.key.device)
        return self.neglected > NEGLECT_LIMIT


def project(
    guides: torch.Tensor,
    key: torch.Tensor,
    channels: int | None,
    scale: float,
    valid: torch.Tensor | None = None,
    merged: torch.Tensor | None = None,
) -> Projected:
    """Guides and keys in `channels` channels, whose products are close to those in all of them.

    The same number for each KV head, also where it neglects too much.

    Args:
        guides: [..., G, n, D].
        key: [..., Lk, D].
        channels: How many; None for all, as more than D are.
        scale: Factor of the logits.
        valid: [..., Lk], False for keys that do not count; None for none of these.
        merged: What is projected in place of the guides, which are then a sample [..., g, n, D]; None for themselves.
    """
    if channels is None or channels >= key.shape[-1]:
        return Projected(guides if merged is None else merged, key, None)
    counted = masked(key, valid)
    some = _sampled(guides, guides.shape[-3] * guides.shape[-2]).flatten(-3, -2)
    some_keys = _sampled(counted, key.shape[-2])
    of_guides, of_keys, neglected = principal_directions(some, some_keys, channels, counted_keys(valid, key.shape[-2]))
    scored = guides if merged is None else merged
    return Projected(scored @ of_guides[..., None, :, :], counted @ of_keys, neglected * scale**2)


def project_kv_head(
    sample: torch.Tensor,
    key: torch.Tensor,
    channels: int | None,
    scale: float,
    valid: torch.Tensor | None,
    guides: torch.Tensor,
) -> Projected:
    """`project` of guides and keys [Lk, D] of one KV head, by a `sample` of guides; all channels where fewer neglect
    too much."""
    projected = project(sample, key, channels, scale, valid, guides)
    return Projected(guides, key, None) if projected.neglects_too_much else projected


def principal_directions(
    query: torch.Tensor, key: torch.Tensor, channels: int, count: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matrices A and B [..., D, channels] such that (q A) (k B)^T is close to q k^T, and `Projected.neglected`.

    Both pick the channels that carry most of the products where these are half of all or more. Fewer start a step of
    subspace iteration (Golub and Van Loan, Matrix Computations, 8.2): with second moments Q of queries and K of keys,
    the best subspace for keys is that of the largest eigenvalues of K Q. With a basis Y, k's projection is
    Y (Y' Q Y)^-1 Y' Q k, which errs least in the mean square of its products with queries. Nothing waits for a GPU.

    Args:
        query: [..., n, D].
        key: [..., Lk, D].
        channels: At most D.
        count: How many of the keys count [...], the others being zeros; None for all.
    """
    queries, _ = _moments(query)
    keys, mean = _moments(key, count)
    strongest = (queries * keys).diagonal(dim1=-2, dim2=-1).topk(channels, -1).indices
    channel = torch.arange(key.shape[-1], device=key.device)
    of_queries = of_keys = (channel[:, None] == strongest[..., None, :]).to(keys.dtype)
    if not picks_channels(channels, key.shape[-1]):
        of_queries, of_keys = _improved(of_keys, queries, keys)
    missing = torch.eye(key.shape[-1], dtype=keys.dtype, device=key.device) - of_queries @ of_keys.mT
    spread = _covariance(keys, mean)
    neglected = ((queries @ missing) * (missing @ spread)).sum((-2, -1)).clamp_min(0)
    return of_queries.to(query.dtype), of_keys.to(key.dtype), neglected


def key_covariance(key: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The covariance of about `_ROWS` of the `valid` [..., Lk] keys [..., Lk, D]: [..., D, D], float64."""
    some = _sampled(masked(key, valid), key.shape[-2])
    return _covariance(*_moments(some, counted_keys(valid, key.shape[-2])))


def _covariance(moments: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    return moments - mean[..., :, None] * mean[..., None, :]


def _improved(basis: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of subspace iteration, and the matrices of the subspace that it gives."""
    basis = keys @ (queries @ basis)
    basis = basis / torch.linalg.vector_norm(basis, dim=-2, keepdim=True).clamp_min(_EPSILON)
    dual = queries @ basis
    both = torch.linalg.solve_triangular(_root(basis.mT @ dual), torch.cat([basis, dual], -2).mT, upper=False).mT
    of_queries, of_keys = both.chunk(2, -2)
    return of_queries, of_keys


def _root(gram: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of a Gram matrix, which fewer rows than channels leave singular but for what is added."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    slack = diagonal.mean(-1, keepdim=True) * _SLACK + _EPSILON
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(slack.expand_as(diagonal)))[0]


def _moments(x: torch.Tensor, count: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments and mean of the rows of X [..., n, D], float64; what is not finite counts as 0.

    Of `count` [...] rows where the others are zeros that do not count.
    """
    rows = x.double().nan_to_num(0, 0, 0)
    moments, sums = rows.mT @ rows, rows.sum(-2)
    if count is None:
        return moments / rows.shape[-2], sums / rows.shape[-2]
    of_rows = count.clamp_min(1)
    return moments / of_rows[..., None, None], sums / of_rows[..., None]


def _sampled(x: torch.Tensor, rows: int) -> torch.Tensor:
    """Every n-th row of X [..., n, D], such that about `_ROWS` of `rows` are left."""
    return x[..., :: sampling_step(rows), :]


def counted_keys(valid: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """The number of sampled keys that are `valid` [..., Lk]: [...], None for all."""
    return None if valid is None else valid[..., :: sampling_step(keys)].sum(-1)


def sampling_step(rows: int) -> int:
    """The step at which `rows` are sampled."""
    return max(1, rows // _ROWS)


def picks_channels(channels: int | None, size: int) -> TypeGuard[int]:
    """Whether the directions are some of `size` channels themselves: where they are half of them or more, not all."""
    return channels is not None and channels < size <= 2 * channels
