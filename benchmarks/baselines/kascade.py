"""Kascade (arXiv 2512.16391, github.com/microsoft/kascade): a few layers choose keys, and the others reuse them.

An anchor layer computes its attention, adds it up over a tile of queries and the query heads of a KV head, and keeps
the keys with the most of it. A later layer visits what the last anchor's heads have kept, each KV head following the
one that serves it best on a development text; the anchors are those that serve best together. The published
development set cannot be had without a download, so the text is the caller's; published anchors are for other models.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from ..captured import Layer
from .blocks import last_attention, pool, strips
from .visit import Visit

KEPT = 0.1
TILE = 32
LEAST_KEYS = 128
"""Share of the keys before a tile that are kept with the tile's own, queries of a tile, and the fewest keys, all as in
the published example (`rolling_prefill`)."""
ANCHORS = 5 / 32
"""Anchors by layer, as published for models of 32 to 36 layers, the first layer being one."""
FIRST_LAYERS = 1
"""Layers that attend densely, as published: a crutch."""
DEVELOPMENT_TOKENS = 2048


@dataclass(frozen=True)
class Plan:
    """Which layers choose, and whom the others follow.

    Attributes:
        anchors: Layers, ascending, the first of them 0.
        heads: For each layer and KV head, the KV head of the last anchor that it follows.
    """

    anchors: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]


@dataclass
class Kascade:
    """The rule of a whole model, whose layers are to come in order; without a plan every layer is an anchor.

    Attributes:
        kept: Share of the keys before a tile.
        plan: Made by `make_plan`.
    """

    kept: float = KEPT
    plan: Plan | None = None
    _chosen: torch.Tensor = field(default_factory=lambda: torch.zeros(0), repr=False)

    def visits(self, layer: Layer, index: int) -> list[Visit]:
        """What each query head of a layer visits; `index` counts layers from 0."""
        followed = list(range(len(layer.key)))
        if is_anchor := self.plan is None or index in self.plan.anchors:
            self._chosen = best_keys(pooled_attention(layer), self.kept)
        elif self.plan is not None:
            followed = list(self.plan.heads[index])
        masks = self._chosen[followed]
        ranking = float(layer.length**2 * layer.key.shape[2]) if is_anchor else 0.0
        heads = layer.heads // len(layer.key)
        return [Visit(mask, TILE, 1, ranking) for mask in masks for _ in range(heads)]


def pooled_attention(layer: Layer) -> torch.Tensor:
    """The attention of the query heads of a KV head, averaged over them and over tiles: [Hkv, tiles, L]."""
    pooled = layer.key.new_zeros(len(layer.key), -(-layer.length // TILE), layer.length, dtype=torch.float32)
    for index in range(len(layer.key)):
        query, key, _ = (x.float() for x in layer.group(index))
        for strip in strips(layer.length, TILE):
            tiles = slice(strip.start // TILE, -(-strip.stop // TILE))
            for head in query:
                attention = last_attention(head[: strip.stop], key[: strip.stop], layer.scale, len(strip))
                pooled[index, tiles, : strip.stop] += pool(attention, TILE)
    return pooled / (layer.heads // len(layer.key))


def best_keys(pooled: torch.Tensor, kept: float) -> torch.Tensor:
    """The keys before each tile with the most attention, and the tile's own: [Hkv, tiles, L] boolean."""
    length = pooled.shape[2]
    starts = torch.arange(0, length, TILE, device=pooled.device)
    positions = torch.arange(length, device=pooled.device)
    before = positions < starts[:, None]
    counts = (kept * starts).long().clamp_min(LEAST_KEYS) - TILE
    ordered, index = pooled.masked_fill(~before, -1).sort(-1, descending=True)
    wanted = (torch.arange(length, device=pooled.device) < counts[:, None]) & (ordered >= 0)
    own = ~before & (positions < starts[:, None] + TILE)
    return torch.zeros_like(wanted).scatter(-1, index, wanted) | own


def make_plan(layers: Iterable[Layer], kept: float = KEPT) -> Plan:
    """The plan for a model, from what all its layers attend on a development text."""
    pooled = [pooled_attention(layer) for layer in layers]
    served = torch.stack([torch.stack([_served(best_keys(some, kept), other) for other in pooled]) for some in pooled])
    anchors = choose_anchors(served.amax(-1).mean(-1), max(2, round(ANCHORS * len(pooled))))
    last = [max(anchor for anchor in anchors if anchor <= index) for index in range(len(pooled))]
    heads = tuple(tuple(served[anchor, index].argmax(-1).tolist()) for index, anchor in enumerate(last))
    return Plan(anchors, heads)


def _served(chosen: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
    """The share of each KV head's attention on the keys that each head of an anchor chose: [heads, anchor's heads]."""
    return torch.einsum("atl,htl->ha", chosen.float(), pooled) / pooled.shape[1]


def choose_anchors(similarity: torch.Tensor, count: int) -> tuple[int, ...]:
    """The `count` anchors, the first layer being one, with the largest sum of what every layer's last anchor gives it.

    Args:
        similarity: [anchors, layers]; only layers from the anchor on count.
        count: At most as many as there are layers.
    """
    layers = len(similarity)

    @functools.cache
    def best(anchor: int, left: int) -> tuple[float, tuple[int, ...]]:
        """From an anchor on, with so many anchors after it."""
        if not left:
            return float(similarity[anchor, anchor:].sum()), (anchor,)
        found = []
        for following in range(anchor + 1, layers - left + 1):
            value, rest = best(following, left - 1)
            found.append((float(similarity[anchor, anchor:following].sum()) + value, (anchor, *rest)))
        return max(found)

    return best(0, min(count, layers) - 1)[1]
