"""Settings other than the default's: each overrides one step of `ops.reference`, or two that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from . import reference
from .config import GAIN_CHUNK, S2OConfig
from .reference import BLOCK, Call, Guides, Segment, Steps, logits, up
from .visibility import Visibility

MOST = 4.0
"""Thresholds of a row's mass that a misjudged sampled key may add beyond its own mass."""


def steps_of(config: S2OConfig, call: Call) -> Steps:
    """The steps that a configuration, as far as the call's mask lets it be followed, asks for."""
    width, ranking = call.key.shape[4], config.ranking
    has_few_channels = 2 * (ranking.channels or width) < width
    has_mean_guides = ranking.pool > 1 or ranking.guides == "kv_head"
    steps = Steps()
    if config.last_queries:
        steps = steps._replace(span=partial(span_of_last_queries, last_queries=config.last_queries))
    if has_mean_guides:
        steps = steps._replace(guides=partial(mean_guides, pool=ranking.pool, over_heads=ranking.guides == "kv_head"))
    if not ranking.merges:
        steps = steps._replace(merge=partial(unmerged, pool=ranking.pool))
    if has_few_channels:
        steps = steps._replace(projection=subspace)
    if ranking.lists == "head":
        steps = steps._replace(by_list=by_head)
    if ranking.combine == "mean":
        steps = steps._replace(importance=mean_importance)
    if ranking.measure == "output":
        steps = steps._replace(importance=partial(importance_of_values, steps.importance, value_distances(call)))
    if ranking.rule == "gain":
        select = partial(select_by_gain, call, tile=ranking.tile, chunk=GAIN_CHUNK)
        steps = steps._replace(select=select, log_weights=no_log_weights)
    elif ranking.rule != "sampled" or config.threshold == 0:
        steps = steps._replace(select=select_by_threshold)
    elif has_few_channels or has_mean_guides:
        steps = steps._replace(log_weights=partial(bounded_log_weights, call))
    if config.has_means:
        steps = steps._replace(softmax=softmax_with_means, visited_keys=visited_keys_with_means)
    return steps


reference_attention = partial(reference.attend, steps_of=steps_of)
"""`reference.attend` with all settings of `config`."""


def span_of_last_queries(
    index: int, segment: int, near_keys: int, queries: int, keys: int, terms: Visibility, last_queries: int
) -> tuple[int, int, int]:
    """The segments that hold any of the last queries rank nothing: their dense span is all that they may see."""
    start, low, high = reference.span(index, segment, near_keys, queries, keys, terms)
    if (index + 1) * segment <= queries - last_queries:
        return start, low, high
    return start, start, max(start, high) if terms.is_causal else keys


def mean_guides(query: Tensor, seen: Tensor, pool: int, over_heads: bool) -> tuple[Tensor, Tensor]:
    """Means of `pool` consecutive queries (S2O: of all queries of a segment), which see what the first of them sees.

    Where guides are packed ("kv_head"), also means over the heads of a KV head.
    """
    guide = torch.stack([some.mean(-2) for some in query.split(pool, -2)], -2)
    seen = seen[..., ::pool, :]
    return (guide.mean(2, keepdim=True), seen[:, :, :1]) if over_heads else (guide, seen)


def unmerged(call: Call, query: Tensor, seen: Tensor, covariance: Tensor, radius: float, pool: int) -> Guides:
    """Guides as they are, each that of `pool` queries."""
    owner = torch.arange(query.shape[3], device=query.device).repeat_interleave(pool)
    return Guides(query, seen, owner.expand(*query.shape[:3], -1), query.new_zeros(query.shape[:4]))


def subspace(guide_moments: Tensor, key_moments: Tensor, count: int) -> Tensor:
    """P for less than half of the channels, where some channels themselves are not good enough: this project's own.

    One step of subspace iteration from the strongest channels E towards the largest eigenvalues of K Q, the moments of
    keys and guides (Golub and Van Loan, Matrix Computations, 8.2). With the basis Y = K Q E, the keys' projection with
    the least squared error of products is Y (Y' Q Y)^-1 Y' Q, and P its transpose; P' = A B' with the Cholesky factor
    of Y' Q Y, to which a little is added, as few guides leave it singular.
    """
    chosen = reference.projection(guide_moments, key_moments, count)
    strongest = chosen.diagonal(dim1=-2, dim2=-1).topk(count).indices
    basis = key_moments @ guide_moments @ chosen.gather(-1, strongest[..., None, :].expand(*chosen.shape[:-1], count))
    basis = basis / torch.linalg.vector_norm(basis, dim=-2, keepdim=True).clamp_min(1e-60)
    dual = guide_moments @ basis
    gram = basis.mT @ dual
    slack = gram.diagonal(dim1=-2, dim2=-1).mean(-1) * 1e-10 + 1e-60
    identity = torch.eye(count, dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky_ex(gram + slack[..., None, None] * identity)[0]
    a, b = (torch.linalg.solve_triangular(root, x.mT, upper=False).mT for x in (basis, dual))
    return a @ b.mT


def by_head(x: Tensor) -> Tensor:
    """One list of keys per query head (S2O), rather than per KV head: guides [B, H, G, n, N] as they are."""
    return x


def mean_importance(share: Tensor) -> Tensor:
    """a_j = mean_i p_ij over the guides of each list."""
    return share.mean(3, keepdim=True)


def importance_of_values(importance: Callable[[Tensor], Tensor], distance: Tensor, share: Tensor) -> Tensor:
    """a_j d_j, for the "output" measure: what leaving out key j does to the output, in units of the output."""
    return importance(share) * distance


def value_distances(call: Call) -> Tensor:
    """d_j = sqrt(1 + |v_j|^2 / E|o|^2) of each KV head [B, H, 1, 1, N]: this project's own.

    A row without key j errs by p_ij (v_j - o_i); values far away are about orthogonal to outputs. E|o|^2 is the mean
    over 64 queries, evenly spread over the heads and the length, of those with a finite output. 1 where it is 0.
    Visits in proportion to the size of a contribution err least (Neyman allocation; Cochran, Sampling Techniques, 5.5).
    """
    heads, length = call.query.shape[2:4]
    count = max(1, 64 // heads)
    rows = [(2 * i + 1) * length // (2 * count) for i in range(count)] if length else []
    weighed = logits(call, call.query[..., rows, :]).masked_fill(~call.seen[..., rows, :], -math.inf)
    square = (weighed.softmax(-1) @ call.value).square().sum(-1).flatten(2)
    is_finite = square.isfinite()
    mean = square.masked_fill(~is_finite, 0).sum(-1) / is_finite.sum(-1).clamp_min(1)
    mean = mean[:, :, None, None, None]
    squares = call.value.square().sum(-1)[:, :, :, None]
    return torch.where(mean > 0, 1 + squares / mean, 1.0).sqrt()


def select_by_threshold(segment: Segment, importance: Tensor, threshold: float) -> Tensor:
    """J = {j: a_j >= theta}, without a sample of the tail."""
    return importance >= threshold


def select_by_gain(call: Call, segment: Segment, importance: Tensor, threshold: float, tile: int, chunk: int) -> Tensor:
    """S2O's own rule: `chunk` keys after another by importance, until no row of a tile gains enough mass by the last.

    With m_i the mass of row i so far, at first that of its dense span: a tile stops after the first chunk C with
    sum_{j in C} exp(l_ij) < theta m_i for all its rows i. Returns J by row, [B, H, G, R, N].
    """
    rank = importance.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    candidate = importance > -math.inf
    weighed = logits(call, segment.query).masked_fill(~segment.seen, -math.inf)
    listed = torch.zeros_like(segment.seen)
    for first in range(0, weighed.shape[3], tile):
        rows = slice(first, first + tile)
        mass = weighed[..., rows, :].masked_fill(~segment.dense, -math.inf).logsumexp(-1)
        goes_on = torch.ones_like(mass[..., :1, None], dtype=torch.bool)
        for begin in range(0, weighed.shape[4], chunk):
            part = candidate & (rank >= begin) & (rank < begin + chunk) & goes_on
            listed[..., rows, :] |= part
            gained = weighed[..., rows, :].masked_fill(~part, -math.inf).logsumexp(-1)
            goes_on = goes_on & ~((gained - mass).exp() < threshold).all(-1)[..., None, None]
            mass = torch.logaddexp(mass, gained)
    return listed


def no_log_weights(segment: Segment, importance: Tensor, threshold: float, log_z: Tensor) -> Tensor:
    """Every key weighs 1."""
    return torch.zeros_like(importance)


def bounded_log_weights(call: Call, segment: Segment, importance: Tensor, threshold: float, log_z: Tensor) -> Tensor:
    """Weights by row where guides or few channels may misjudge keys: w_j exp(l_ij) <= max(exp(l_ij), 4 theta Z_i).

    Z_i is that of the row's guide. A little bias for much variance (truncated importance sampling, Ionides, 2008).
    """
    log_w = reference.log_weights(segment, importance, threshold, log_z)
    bound = (log_z[..., : segment.query.shape[3], None] + math.log(MOST * threshold)).nan_to_num(
        math.inf, math.inf, -math.inf
    )
    return torch.minimum(log_w, (bound - logits(call, segment.query)).clamp_min(0))


def softmax_with_means(call: Call, segment: Segment, listed: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The softmax with one more key per block of the history: the mean of its keys, which weighs as many as J lacks.

    This project's own, as is the mean of the values that goes with it.
    """
    history = segment.history & segment.seen.any(2, keepdim=True).any(3, keepdim=True)
    size = in_blocks(history.double()).sum(-1)[:, :, :, 0, :, None]
    means = [(in_blocks(x.masked_fill(~history.mT, 0).mT).sum(-1).mT / size[..., :1].clamp_min(1)) for x in call[1:3]]
    left = in_blocks((history & ~listed).double()).sum(-1)
    return reference.softmax(
        call._replace(key=torch.cat([call.key, means[0]], 3), value=torch.cat([call.value, means[1]], 3)),
        segment._replace(
            seen=pad(segment.seen, (0, left.shape[-1]), value=True), dense=pad(segment.dense, (0, left.shape[-1]))
        ),
        torch.cat([listed, left > 0], -1),
        torch.cat([log_weight, left.log()], -1),
    )


def visited_keys_with_means(segment: Segment, dense: Tensor, listed: Tensor) -> Tensor:
    """One more key per block of the history."""
    return reference.visited_keys(segment, dense, listed) + up(in_blocks(segment.history).any(-1).sum())


def in_blocks(x: Tensor) -> Tensor:
    """Keys [..., N] as [..., blocks, BLOCK], the last block filled up with zeros."""
    return pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
