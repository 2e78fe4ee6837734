"""The rule of sparse attention written a second time, from the documentation, in NumPy and float64.

Nothing here is shared with the package but the settings and the terms of a call. What the implementations share with
their specification (guides, channels, spans, draws, weights) is compared with this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from s2o_compile.ops import S2OConfig
from s2o_compile.ops.visibility import Visibility

Array = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
BLOCK = 64


def up(count: int) -> int:
    """The count in whole blocks."""
    return math.ceil(count / BLOCK) * BLOCK


def down(count: int) -> int:
    return math.floor(count / BLOCK) * BLOCK


def visible(terms: Visibility, batch: int, head: int, row: int, key: int) -> bool:
    """Whether a query sees a key, one term after another."""
    place = row + terms.causal_offset
    if terms.is_causal and key > place:
        return False
    if terms.window is not None and place - key >= terms.window:
        return False
    if terms.key_padding is not None and not terms.key_padding[batch, key]:
        return False
    of_row, of_key = terms.query_documents, terms.key_documents
    if of_row is not None and of_key is not None and of_row[batch, row] != of_key[batch, key]:
        return False
    if terms.mask is None:
        return True
    place = zip((batch, head, row, key), terms.mask.shape, strict=True)
    return bool(terms.mask[tuple(min(index, size - 1) for index, size in place)])


def followed(config: S2OConfig, terms: Visibility) -> S2OConfig:
    """The settings as far as a call can follow them: what queries see differently has no mean for them all."""
    if terms.query_documents is not None or terms.mask is not None:
        config = replace(config, pool=1, guides="head")
    varies = terms.window is not None or terms.query_documents is not None or terms.mask is not None
    return replace(config, tail="sampled") if varies and config.tail == "means" else config


def span(segment: int, queries: int, keys: int, terms: Visibility, config: S2OConfig) -> tuple[int, int, int]:
    """Where the history of a segment starts, and its dense span [low, high)."""
    first, end = segment * config.segment, min((segment + 1) * config.segment, queries)
    first_place, end_place = first + terms.causal_offset, end + terms.causal_offset
    start = 0
    if terms.window is not None:
        start = down(min(max(first_place - terms.window + 1, 0), keys))
    if config.last_queries and first + config.segment > queries - config.last_queries:
        low, high = start, keys
    else:
        low = down(min(max(first_place - config.near_keys, start), keys))
        high = min(up(min(max(end_place + config.near_keys, 0), keys)), keys)
    if terms.is_causal:
        high = min(max(end_place, 0), keys)
    return start, low, max(low, high)


def draw(key: int, segment: int) -> float:
    """A Weyl sequence along keys and segments, of 23 bits."""
    golden, silver = (5**0.5 - 1) / 2, 2**0.5 - 1
    bits = (key * round(golden * 2**32) + segment * math.floor(silver * 2**32)) % 2**32
    return (bits // 2**9 + 0.5) / 2**23


def capped(logits: Array, softcap: float) -> Array:
    return softcap * np.tanh(logits / softcap) if softcap else logits


def pooled(query: Array, config: S2OConfig) -> Array:
    """Means of consecutive queries [heads, guides, D]."""
    size = config.pool
    means = np.array([[head[i : i + size].mean(0) for i in range(0, len(head), size)] for head in query])
    return means if config.guides == "head" else means.mean(0)[None]


def scores(guides: Array, key: Array, valid: Flags, scale: float, config: S2OConfig) -> tuple[Array, float]:
    """Logits in as many channels as the setting says [heads, guides, keys], and the variance of what these lack."""
    size = key.shape[1]
    everything = guides @ key.T * scale
    if config.channels is None or config.channels >= size:
        return everything, 0.0
    rows = guides.reshape(-1, size)
    second_of_guides, second_of_keys = rows.T @ rows / len(rows), key[valid].T @ key[valid] / max(1, valid.sum())
    energy = np.diag(second_of_guides) * np.diag(second_of_keys)
    strongest = sorted(range(size), key=lambda channel: -energy[channel])[: config.channels]
    if 2 * config.channels >= size:
        projection = np.diag([float(channel in strongest) for channel in range(size)])
    else:
        basis = second_of_keys @ second_of_guides[:, strongest]
        basis /= np.linalg.norm(basis, axis=0).clip(1e-60)
        gram = basis.T @ second_of_guides @ basis
        projection = basis @ np.linalg.lstsq(gram, basis.T @ second_of_guides, rcond=1e-13)[0]
    few = guides @ projection @ key.T * scale
    variance = float((few - everything)[..., valid].var(-1).mean()) if valid.any() else 0.0
    return (everything, 0.0) if variance > 2 else (few, variance)


def value_distances(query: Array, key: Array, value: Array, seen: Flags, scale: float, softcap: float) -> Array:
    """How far each value is from the outputs, in units of these, taken as orthogonal to it."""
    heads, length = query.shape[:2]
    count = max(1, 64 // heads)
    squares = []
    for i in range(count):
        row = math.floor((i + 0.5) * length / count)
        for head in range(heads):
            if seen[head, row].any():
                logits = capped(query[head, row] @ key.T * scale, softcap)[seen[head, row]]
                share = np.exp(logits - logits.max())
                squares.append(np.square(share / share.sum() @ value[seen[head, row]]).sum())
    size = np.mean(squares) if squares else 0.0
    return np.sqrt(1 + np.square(value).sum(1) / size) if size > 0 else np.ones(len(value))


@dataclass
class Rows:
    """What a call returns, of one KV group."""

    output: Array
    lse: Array
    visited: npt.NDArray[np.int64]


def attend_group(
    query: Array,
    key: Array,
    value: Array,
    seen: Flags,
    terms: Visibility,
    valid: Flags,
    scale: float,
    softcap: float,
    config: S2OConfig,
) -> Rows:
    """Queries [G, Lq, D] of the heads of a KV group, keys [Lk, D], values [Lk, Dv], seen [G, Lq, Lk], valid [Lk]."""
    heads, queries, keys = seen.shape
    position = np.arange(keys)
    key, value = np.where(valid[:, None], key, 0), np.where(valid[:, None], value, 0)
    guides = pooled(query, config)
    logits, lack = scores(guides, key, valid, scale, config)
    logits, exact = capped(logits, softcap), capped(guides @ key.T * scale, softcap)
    distance = value_distances(query, key, value, seen, scale, softcap) if config.measure == "output" else np.ones(keys)
    rows = Rows(
        np.zeros((heads, queries, value.shape[1])),
        np.full((heads, queries), -np.inf),
        np.zeros((heads, math.ceil(queries / config.tile)), dtype=np.int64),
    )
    for segment in range(math.ceil(queries / config.segment)):
        start, low, high = span(segment, queries, keys, terms, config)
        dense = (position >= low) & (position < high)
        history = (position >= start) & (position < low)
        if not terms.is_causal:
            history |= position >= high
        first, end = segment * config.segment, min((segment + 1) * config.segment, queries)
        of_segment = range(first // config.pool, math.ceil(end / config.pool))
        in_sample = position % config.sample == config.sample // 2
        counts = dense + history * np.where(position < config.first_keys, 1, config.sample * in_sample)
        share = np.zeros((len(guides), len(of_segment), keys))
        guide_lse = np.zeros((len(guides), len(of_segment)))
        sees = np.array([[seen[head, guide * config.pool] for guide in of_segment] for head in range(len(guides))])
        for head in range(len(guides)):
            for i, guide in enumerate(of_segment):
                mass = (counts * np.exp(exact[head, guide]))[sees[head, i]].sum()
                guide_lse[head, i] = np.log(mass) if mass else -np.inf
                if mass:
                    share[head, i] = np.exp(logits[head, guide] + lack) / mass
                else:
                    share[head, i] = np.inf
                share[head, i, ~sees[head, i]] = 0
        together = [range(len(guides))] if config.lists == "group" else [[head] for head in range(heads)]
        for members in together:
            of_list = share[list(members)].reshape(-1, keys)
            importance = np.maximum(of_list.max(0) * config.max_weight, of_list.mean(0) * config.mean_weight)
            importance *= distance
            importance[: config.first_keys] = np.inf
            candidate = history & sees[list(members)].reshape(-1, keys).any(0)
            weight = np.ones(keys)
            if config.threshold == 0 or config.stop == "gain":
                listed = candidate
            elif config.tail == "sampled":
                chance = np.minimum(importance / config.threshold, 1)
                drawn = np.array([chance[k] >= draw(k, segment) for k in range(keys)])
                listed = candidate & drawn
                weight[listed] = 1 / chance[listed]
            else:
                listed = candidate & (importance >= config.threshold)
            order = sorted(np.flatnonzero(listed), key=lambda k: -importance[k])
            for head in range(heads) if config.lists == "group" else members:
                lse_of_head = guide_lse[head if len(guides) > 1 else 0]
                for tile in range(first // config.tile, math.ceil(end / config.tile)):
                    attend_tile(
                        rows, head, tile, query, key, value, seen, terms, scale, softcap, config,
                        low, high, history & valid, order, weight, listed, lse_of_head, first,
                    )  # fmt: skip
    return rows


def attend_tile(
    rows: Rows, head: int, tile: int, query: Array, key: Array, value: Array, seen: Flags, terms: Visibility,
    scale: float, softcap: float, config: S2OConfig, low: int, high: int, history: Flags, order: list[int],
    weight: Array, listed: Flags, guide_lse: Array, first: int,
) -> None:  # fmt: skip
    """Softmax over the dense span, the list and the means; by the "gain" rule, as much of the list as gains."""
    queries, keys = query.shape[1], len(key)
    of_tile = range(tile * config.tile, min((tile + 1) * config.tile, queries))
    end = high
    if terms.is_causal:
        end = max(low, min(max(of_tile.stop + terms.causal_offset, 0), keys))
    logits = {row: capped(query[head, row] @ key.T * scale, softcap) for row in of_tile}
    mass: dict[int, Array] = {row: np.zeros(keys) for row in of_tile}
    for row in of_tile:
        sees = seen[head, row]
        mass[row][low:end] = (np.exp(logits[row]) * sees)[low:end]
    work = up(end - low)
    chunk = config.chunk if config.stop == "gain" else max(1, len(order))
    bounded = config.tail == "sampled" and config.threshold > 0
    scored = key.shape[1] if config.channels is None else config.channels
    bounded = bounded and (config.pool > 1 or config.guides == "group" or 2 * scored < key.shape[1])
    for begin in range(0, len(order), chunk):
        part = order[begin : begin + chunk]
        work += up(len(part))
        gains = []
        for row in of_tile:
            before = mass[row].sum()
            for k in part:
                if seen[head, row, k]:
                    own = np.exp(logits[row][k])
                    weighed = own * weight[k]
                    if bounded:
                        most = 4 * config.threshold * np.exp(guide_lse[(row - first) // config.pool])
                        weighed = min(weighed, max(own, most))
                    mass[row][k] = weighed
            gained = mass[row].sum() - before
            gains.append(gained < config.threshold * before)
        if config.stop == "gain" and all(gains):
            break
    blocks = math.ceil(keys / BLOCK) if config.tail == "means" and config.threshold > 0 else 0
    if blocks:
        work += up(low // BLOCK + (0 if terms.is_causal else math.ceil((keys - high) / BLOCK)))
    for row in of_tile:
        total, denominator = mass[row] @ value, mass[row].sum()
        for block in range(blocks):
            members = np.zeros(keys, dtype=bool)
            members[block * BLOCK : (block + 1) * BLOCK] = True
            members &= history
            left = (members & ~listed).sum()
            if left:
                mean_key, mean_value = key[members].mean(0), value[members].mean(0)
                own = left * np.exp(capped(query[head, row] @ mean_key * scale, softcap))
                total, denominator = total + own * mean_value, denominator + own
        if denominator:
            rows.output[head, row], rows.lse[head, row] = total / denominator, np.log(denominator)
    rows.visited[head, tile] = work * len(of_tile)
