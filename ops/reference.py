"""The specification: sparse attention in ten minutes, in float64, as pure functions in the order of the steps.

Every implementation is tested against this file, which shares nothing with them but settings, mask and result type.
It holds the default rule for heads of up to 128 channels; `ops.reference_variants` overrides single steps for wider
heads and for other settings.

The method is S2O (Early Stopping for Sparse Attention via Online Permutation, arXiv 2602.22575): the queries of a
*segment* visit keys in order of importance, gathered through an index, and stop where the rest no longer matters.
This project's own are: queries score keys as one only if they are alike (the paper: the segment's mean query), one
choice for all query heads of a KV head, estimated denominators, scores in at most 64 channels, and a sampled tail
instead of a hard stop.

For a segment S with *dense span* D and *history* H, queries i in S of all query heads of a KV head, keys j. In shares
and their denominators i are *guides*, means of alike queries, from whose logits they lie about sigma_i away (`merge`):

    l_ij = scale q_i . k_j                                                      logits            `logits`
    Z_i  = sum_{j in D} exp(l_ij) + r sum_{every r-th j in H} exp(l_ij)         denominators      `log_normalisers`
    l'_ij = scale (q_i P) . k_j, P keeps few channels, nu is what they lack     scores            `channels`
    p_ij = exp(l'_ij + (sigma_i^2 + nu^2)^(1/2)) / Z_i                          shares of mass
    a_j  = max_i p_ij                                                           importance        `importance`
    pi_j = min(1, a_j / theta)                                                  chance of a visit `chance`
    J    = {j in H: pi_j >= u_j}, u_j as if uniform in (0, 1)                   visited keys      `select`, `draws`
    w_j  = 1 / pi_j for j in J, 1 for j in D                                    weights           `log_weights`
    o_i  = sum_{j in D, J} w_j exp(l_ij) v_j / sum_{j in D, J} w_j exp(l_ij)    outputs           `softmax`

r is `Ranking.sample` and theta the threshold; the first key counts exactly in Z_i, and a_0 is infinite. A key with
a_j >= theta is sure to be visited, and of the others a sample is. As w_j is 1 / pi_j, both sums of o_i are those of
dense attention in expectation (Horvitz and Thompson, 1952). With theta = 0 every key is visited.

Shapes: B batch, H KV heads, G query heads per KV head, L queries, R of them in a segment, N keys, n guides (the queries
that score keys). Queries are [B, H, G, R, D] and keys [B, H, 1, N, D], so that all broadcasts to [B, H, G, R, N].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .config import S2OConfig
from .result import AttentionResult
from .visibility import Visibility

Count = TypeVar("Count", int, Tensor)

MERGED = 32
"""Consecutive positions whose queries may be merged."""
BLOCK = 64
"""Keys per block, in which spans start and end and visited keys are counted."""


class Call(NamedTuple):
    """A call in float64: `query` [B, H, G, L, D], `key` [B, H, 1, N, D], `value` [B, H, 1, N, Dv], padding zeroed.

    `seen` [B, H, G, L, N] is the whole mask, true where a query sees a key; `valid` [B, N] are the keys that are not
    padding; `sinks` [H, G] are -inf for none.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    seen: Tensor
    valid: Tensor
    scale: float
    softcap: float
    sinks: Tensor


class Guides(NamedTuple):
    """The queries that score keys: `query` [B, H, G, n, D] of n guides, and what they see, `seen` [B, H, G, n, N].

    `owner` [B, H, G, R] is the guide of each query of the segment; `reach` [B, H, G, n] is how far its logits may lie
    from the guide's. A guide without queries sees nothing.
    """

    query: Tensor
    seen: Tensor
    owner: Tensor
    reach: Tensor


class Segment(NamedTuple):
    """A segment: `query` [B, H, G, R, D], `seen` [B, H, G, R, N], and its keys `dense` and `history`, [N] booleans.

    `number` counts from position 0, where the first query of a call stands at `Visibility.causal_offset`.
    """

    number: int
    query: Tensor
    seen: Tensor
    dense: Tensor
    history: Tensor


def call_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: Visibility,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Call:
    """The arguments of `attend` as a `Call`."""
    (batch, heads, length, width), (kv_heads, keys) = query.shape, key.shape[1:3]
    shape = (batch, kv_heads, heads // max(1, kv_heads), length)
    seen = terms.as_mask(batch, length, keys, key.device).expand(batch, heads, length, keys).reshape(*shape, keys)
    valid = torch.ones(batch, keys, device=key.device).bool() if terms.key_padding is None else terms.key_padding
    key, value = (x.double().masked_fill(~valid[:, None, :, None], 0)[:, :, None] for x in (key, value))
    scale = width**-0.5 if scale is None else scale
    sinks = torch.full((heads,), -math.inf, device=key.device) if sinks is None else sinks
    sinks = sinks.double().view(shape[1:3])
    return Call(query.double().reshape(*shape, width), key, value, seen, valid, scale, softcap, sinks)


def logits(call: Call, query: Tensor) -> Tensor:
    """l = scale q . k [..., N]; with a soft cap c, c tanh(l / c) (Gemma 2, arXiv 2408.00118)."""
    product = query @ call.key.mT * call.scale
    return call.softcap * (product / call.softcap).tanh() if call.softcap else product


def span(index: int, segment: int, near_keys: int, queries: int, keys: int, terms: Visibility) -> tuple[int, int, int]:
    """Where the history of a segment starts, and its dense span [low, high).

    D = [low, high) covers the segment itself and the `near_keys` before it, and as many after it without a causal mask.
    H = [start, low), and [high, N) without a causal mask, is whole blocks. A window starts it at the first block that
    any row sees.
    """
    first, end = (min(row, queries) + terms.causal_offset for row in (index * segment, (index + 1) * segment))
    start = 0 if terms.window is None else clip(first - terms.window + 1, keys) // BLOCK * BLOCK
    low = min(max(first - near_keys, start), keys) // BLOCK * BLOCK
    high = clip(end, keys) if terms.is_causal else clip(up(clip(end + near_keys, keys)), keys)
    return start, low, max(low, high)


def guides(query: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The queries that may score keys [B, H, G, n, D], and what they see [B, H, G, n, N]: all queries."""
    return query, seen


def projection(guide_moments: Tensor, key_moments: Tensor, count: int) -> Tensor:
    """P [..., D, D] of scores q P . k: it keeps the `count` channels c with the largest E[q_c^2] E[k_c^2]."""
    energy = (guide_moments * key_moments).diagonal(dim1=-2, dim2=-1)
    return torch.diag_embed(torch.zeros_like(energy).scatter(-1, energy.topk(count).indices, 1))


def key_sample(call: Call) -> tuple[Tensor, Tensor]:
    """About 2^11 of the keys, evenly spread, what is not finite being 0 [B, H, n, D]; which count [B, 1, n, 1]."""
    step = max(1, call.key.shape[3] // 2**11)
    return call.key[:, :, 0, ::step].nan_to_num(0, 0, 0), call.valid[:, None, ::step, None]


def key_covariance(call: Call) -> Tensor:
    """C [B, H, D, D], the covariance of the valid keys of each KV head."""
    keys, counted = key_sample(call)
    total = counted.sum(-2, keepdim=True).clamp_min(1)
    centred = (keys - keys.sum(-2, keepdim=True) / total) * counted
    return centred.mT @ centred / total


def channels(call: Call, guide: Tensor, count: int, projection: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """P [B, H, 1, D, D] and nu [B, H, 1, 1] of each KV head, from the moments of all its queries and valid keys.

    nu = scale^2 E_i Var_j (q_i - q_i P) . k_j is the variance of what scores lack. A score that is off by a normal
    variable of variance nu is as often too small as too large, and too small costs more; the factor e^nu makes up for
    it (measured, not derived). Where nu > 2, all channels are scored: P = 1, nu = 0. About 2^11 of the queries and of
    the keys, evenly spread, give the moments; what is not finite counts as 0.
    """
    step = max(1, guide.shape[2] * guide.shape[3] // 2**11)
    rows = guide[..., ::step, :].flatten(2, 3).nan_to_num(0, 0, 0)
    keys, counted = key_sample(call)
    kept = projection(
        rows.mT @ rows / rows.shape[2], keys.mT @ keys / counted.sum(-2, keepdim=True).clamp_min(1), count
    )
    lack = rows - rows @ kept
    nu = call.scale**2 * (lack @ key_covariance(call) * lack).sum(-1).mean(-1)[:, :, None, None]
    everything = torch.eye(rows.shape[3], dtype=rows.dtype, device=rows.device)
    return torch.where(nu[..., None] > 2, everything, kept[:, :, None]), nu.masked_fill(nu > 2, 0)


def merge(call: Call, query: Tensor, seen: Tensor, covariance: Tensor, radius: float) -> Guides:
    """Alike queries of a head merged: guides are the means m of clusters of queries.

    The distance of two queries is the standard deviation over keys of the difference of their logits,
    d(x, y)^2 = scale^2 (x - y) C (x - y)'. Among the queries of `MERGED` positions, the first centre is the one
    closest to all, each next one that farthest from all centres so far (Gonzalez, Clustering to minimize the maximum
    intercluster distance, 1985), until every query lies within `radius` of a centre; each joins the nearest.
    sigma_g = max over members i of d(m_g, q_i): with it, a guide's logit is about the largest of its members. A guide
    sees what the first of its members sees, so that its denominator is none too large. A distance that is NaN is 0.
    """

    def squares(gap: Tensor) -> Tensor:
        return (call.scale**2 * (gap @ covariance[:, :, None, None]) * gap).sum(-1).nan_to_num(0)

    parts = []
    for first in range(0, query.shape[3], MERGED):
        x, sees = query[..., first : first + MERGED, :], seen[..., first : first + MERGED, :]
        apart = squares(x[..., :, None, :] - x[..., None, :, :])
        farthest = apart.sum(-1).argmin(-1)
        nearest = torch.full_like(apart[..., 0], math.inf)
        owner = torch.zeros_like(nearest, dtype=torch.int64)
        for number in range(x.shape[3]):
            goes_on = nearest.amax(-1, keepdim=True) > radius**2
            distance = apart.take_along_dim(farthest[..., None, None], -2).squeeze(-2)
            owner = torch.where(goes_on & (distance < nearest), number, owner)
            nearest = torch.where(goes_on, nearest.minimum(distance), nearest)
            farthest = nearest.argmax(-1)
        guide = positions(owner)[:, None]
        is_member = owner[..., None, :] == guide
        size = is_member.sum(-1, keepdim=True)
        mean = torch.where(is_member[..., None], x[..., None, :, :], 0).sum(-2) / size.clamp_min(1)
        reach = squares(mean[..., :, None, :] - x[..., None, :, :]).masked_fill(~is_member, 0).amax(-1).sqrt()
        sees = sees.take_along_dim(is_member.int().argmax(-1)[..., None], -2) & (size > 0)
        parts.append(Guides(mean, sees, owner + first, reach))
    return Guides(*(torch.cat(x, dim) for x, dim in zip(zip(*parts, strict=True), (-2, -2, -1, -1), strict=True)))


def log_normalisers(segment: Segment, logits: Tensor, seen: Tensor, sample: int, first_keys: int) -> Tensor:
    """log Z_i of each guide [B, H, G, n], over the keys that it sees.

    Keys count once in the dense span and among the first keys of the history; of the others those with
    j = r // 2 (mod r) count r = `sample` times.
    """
    key = positions(seen)
    exact = segment.dense | (segment.history & (key < first_keys))
    drawn = segment.history & ~exact & (key % sample == sample // 2)
    counts = exact + sample * drawn.double()
    return (logits + counts.log()).masked_fill(~seen | (counts == 0), -math.inf).logsumexp(-1)


def by_list(x: Tensor) -> Tensor:
    """[B, H, G, n, N] of guides by list of keys: one for all guides of a KV head, [B, H, 1, G n, N]."""
    return x.flatten(2, 3)[:, :, None]


def importance(share: Tensor) -> Tensor:
    """a_j = max_i p_ij over the guides of each list [B, H, lists, n, N]: [B, H, lists, 1, N]."""
    return share.amax(3, keepdim=True)


def ranked(importance: Tensor, seen: Tensor, history: Tensor, first_keys: int) -> Tensor:
    """a_j where it decides: inf for the first keys and those of a guide that tells nothing (NaN), -inf outside of H."""
    is_sure = importance.isnan() | (positions(seen) < first_keys)
    candidate = history & seen.any(3, keepdim=True)
    return importance.masked_fill(is_sure, math.inf).masked_fill(~candidate, -math.inf)


def chance(importance: Tensor, threshold: float) -> Tensor:
    """pi_j = min(1, a_j / theta)."""
    return torch.where(importance >= threshold, 1.0, importance / threshold)


def draws(key: Tensor, segment: int) -> Tensor:
    """u_j = (floor(x / 2^9) + 1/2) / 2^23 with x = 2654435769 j + 1779033703 s (mod 2^32), of key j in segment s.

    2^32 times the golden ratio's fraction and that of sqrt(2): a Weyl sequence, evenly spread however few are drawn.
    Which draws is part of the specification, as equal calls give equal results; so the formula is repeated here. A
    prompt that is cut at multiples of the segment draws as it does whole.
    """
    return ((key * 2654435769 + segment * 1779033703) % 2**32 // 2**9 + 0.5).double() / 2**23


def select(segment: Segment, importance: Tensor, threshold: float) -> Tensor:
    """J = {j: pi_j >= u_j}, the keys visited besides the dense span, [B, H, lists, 1, N] boolean."""
    return chance(importance, threshold) >= draws(positions(importance), segment.number)


def log_weights(segment: Segment, importance: Tensor, threshold: float, log_z: Tensor) -> Tensor:
    """log w_j = -log pi_j of the keys in J; depends on no query."""
    return -chance(importance, threshold).log()


def softmax(call: Call, segment: Segment, listed: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor]:
    """o_i [B, H, G, R, Dv], and the log of its denominator [B, H, G, R]; zeros and -inf where no key is seen.

    A sink adds exp(sink) to the denominator (gpt-oss).
    """
    visited = segment.seen & (segment.dense | listed)
    weighed = logits(call, segment.query) + torch.where(listed, log_weight, 0)
    weighed = weighed.masked_fill(~visited, -math.inf)
    lse = torch.logaddexp(weighed.logsumexp(-1), call.sinks[..., None])
    return (weighed - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp() @ call.value, lse


def visited_keys(segment: Segment, dense: Tensor, listed: Tensor) -> Tensor:
    """The keys visited of `dense` [N] and `listed` [..., N], counted in whole blocks [...]."""
    return up(dense.sum()) + up(listed.sum(-1))


class Steps(NamedTuple):
    """The functions of this file that another setting may override (`ops.reference_variants`)."""

    span: Callable[..., tuple[int, int, int]] = span
    guides: Callable[..., tuple[Tensor, Tensor]] = guides
    merge: Callable[..., Guides] = merge
    projection: Callable[..., Tensor] = projection
    by_list: Callable[..., Tensor] = by_list
    importance: Callable[..., Tensor] = importance
    select: Callable[..., Tensor] = select
    log_weights: Callable[..., Tensor] = log_weights
    softmax: Callable[..., tuple[Tensor, Tensor]] = softmax
    visited_keys: Callable[..., Tensor] = visited_keys


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visibility: Visibility | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    config: S2OConfig | None = None,
    steps_of: Callable[[S2OConfig, Call], Steps] = lambda config, call: Steps(),
) -> AttentionResult:
    """Sparse attention as specified; output and log-sum-exp in the dtype of the query.

    Args:
        query: [B, H G, L, D].
        key: [B, H, N, D].
        value: [B, H, N, Dv].
        visibility: Which keys each query sees, by default all.
        scale: Factor of the logits, by default D ** -0.5.
        softcap: Bound of the logits, 0 for none.
        sinks: [H G], one more logit per head in the softmax, without a value; None for none.
        config: `threshold`, and of its ranking `segment`, `near_keys`, `sample`, `channels`, `radius` and
            `merge_length`, as far as `visibility` lets a call follow them; the rest matters only to `steps_of`, and
            `min_length` not at all.
        steps_of: The steps of other settings, by default those of this file.
    """
    terms = visibility or Visibility()
    config = terms.effective_config(config or S2OConfig(), key.shape[2])
    ranking = config.ranking
    theta, size, tile, sample, radius = config.threshold, ranking.segment, ranking.tile, ranking.sample, ranking.radius
    first_keys, near_keys, count = ranking.first_keys, ranking.near_keys, ranking.channels or query.shape[3]

    call = call_of(query, key, value, terms, scale, softcap, sinks)
    shape, keys, position = call.query.shape[:4], call.key.shape[3], positions(call.seen)
    length, width = call.query.shape[3:]
    output, lse = query.new_zeros(*shape, value.shape[3]), query.new_zeros(shape)
    visited = position.new_zeros(*shape[:3], -(-length // tile))

    steps = steps_of(config, call)
    guide, _ = steps.guides(call.query, call.seen)
    few, nu = channels(call, guide, min(count, width), steps.projection)
    covariance = key_covariance(call)
    for index in range(-(-length // size)):
        rows = slice(index * size, min((index + 1) * size, length))
        start, low, high = steps.span(index, size, near_keys, length, keys, terms)
        dense = (position >= low) & (position < high)
        history = (position >= start) & (position < low if terms.is_causal else ~dense)
        number = index + max(0, terms.causal_offset) // size
        segment = Segment(number, call.query[..., rows, :], call.seen[..., rows, :], dense, history)

        guide, sees, owner, reach = steps.merge(call, *steps.guides(segment.query, segment.seen), covariance, radius)
        log_z = log_normalisers(segment, logits(call, guide), sees, sample, first_keys)
        allowance = (reach.square() + nu.square()).sqrt() - log_z
        share = (logits(call, guide @ few) + allowance[..., None]).exp().masked_fill(~sees, 0)
        a = ranked(steps.importance(steps.by_list(share)), steps.by_list(sees), history, first_keys)
        listed = steps.select(segment, a, theta)
        log_weight = steps.log_weights(segment, a, theta, log_z.gather(-1, owner))
        output[..., rows, :], lse[..., rows] = steps.softmax(call, segment, listed, log_weight)

        for first in range(rows.start, rows.stop, tile):
            end = min(first + tile, length)
            shown = dense & (position < end + terms.causal_offset) if terms.is_causal else dense
            of_tile = listed[..., min(first - rows.start, listed.shape[3] - 1), :]
            visited[..., first // tile] = steps.visited_keys(segment, shown, of_tile) * (end - first)
    return AttentionResult(*(x.flatten(1, 2) for x in (output, lse, visited)))


def positions(x: Tensor) -> Tensor:
    """The keys' positions [N], for X [..., N]."""
    return torch.arange(x.shape[-1], device=x.device)


def up(count: Count) -> Count:
    """The count in whole blocks."""
    return -(-count // BLOCK) * BLOCK


def clip(key: int, keys: int) -> int:
    return max(0, min(key, keys))
