"""Ranking in fewer channels: guides and keys in the directions that carry most of their products."""

from __future__ import annotations

import torch

_ROWS = 2**13
"""About how many guides and keys the directions are found from."""
_STEPS = 3
"""From the strongest channels on. Without any, half of the channels are as good, but not a quarter of them."""
_TINY = 1e-60
"""Keeps matrices of zeros from being divided by zero."""


def project(
    guides: torch.Tensor, key: torch.Tensor, channels: int | None, valid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Guides and keys in `channels` channels, whose products are close to those in all of them.

    Args:
        guides: [..., G, n, D].
        key: [..., Lk, D].
        channels: How many; None for all.
        valid: [..., Lk], False for keys that do not count; None for none of these.

    Returns:
        Guides [..., G, n, `channels`] and keys [..., Lk, `channels`], or both as they are where that is not fewer.
    """
    if channels is None or channels >= key.shape[-1]:
        return guides, key
    counted = key if valid is None else torch.where(valid[..., None], key, 0)
    of_guides, of_keys = principal_directions(guides.flatten(-3, -2), counted, channels)
    return guides @ of_guides[..., None, :, :], counted @ of_keys


def principal_directions(query: torch.Tensor, key: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices A and B [..., D, channels] such that (q A) (k B)^T is close to q k^T for such queries and keys.

    With second moments Q of queries and K of keys, the best subspace for keys is that of the largest eigenvalues of
    K Q, found by subspace iteration (Golub and Van Loan, Matrix Computations, 8.2) from the channels that carry most of
    the products; with a basis Y of it, k's projection is Y (Y' Q Y)^-1 Y' Q k, which errs least in the mean square of
    its products with queries. All of it are matrix products and factorisations that need no synchronisation.

    Args:
        query: [..., n, D].
        key: [..., Lk, D].
        channels: At most D.
    """
    queries, keys = _second_moments(query), _second_moments(key)
    energies = (queries * keys).diagonal(dim1=-2, dim2=-1)
    strongest = energies.topk(channels, -1).indices
    basis = keys @ torch.gather(queries, -1, strongest[..., None, :].expand(*queries.shape[:-1], -1))
    for _ in range(_STEPS - 1):
        basis = keys @ (queries @ _orthonormal(basis))
    dual = queries @ basis
    root = _root(basis.mT @ dual)
    return _solve(root, basis).to(query.dtype), _solve(root, dual).to(key.dtype)


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    """A basis of what the columns of X span."""
    x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp_min(_TINY)
    return _solve(_root(x.mT @ x), x)


def _root(gram: torch.Tensor) -> torch.Tensor:
    """The Cholesky factor of a Gram matrix, which fewer rows than channels leave singular but for what is added."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    slack = diagonal.mean(-1, keepdim=True) * (10 * torch.finfo(gram.dtype).eps) + _TINY
    return torch.linalg.cholesky_ex(gram + torch.diag_embed(slack.expand_as(diagonal)))[0]


def _solve(root: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """X R^-T for a Cholesky factor R."""
    return torch.linalg.solve_triangular(root, x.mT, upper=False).mT


def _second_moments(x: torch.Tensor) -> torch.Tensor:
    """X' X of some rows of X [..., n, D], in units of its trace, float64; what is not finite counts as 0."""
    rows = x[..., :: max(1, x.shape[-2] // _ROWS), :]
    rows = rows.to(torch.promote_types(x.dtype, torch.float32)).nan_to_num(0, 0, 0)
    moments = (rows.mT @ rows).double()
    return moments / moments.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp_min(_TINY)
