"""Calls of the operator, and how they are drawn, whatever draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.visibility import Visibility

Choose = Callable[[Sequence[Any]], Any]
"""Draws one of several values."""
BOOLEANS = (False, True)
THRESHOLDS = (0.0, 1e-3, 1e-2, 5e-2)


@dataclass(frozen=True)
class Call:
    """A call of the operator, described by sizes, so that a failing example prints as something to read."""

    batch: int
    groups: int
    group: int
    queries: int
    keys: int
    channels: int
    value_channels: int
    is_causal: bool
    offset: int
    padded: bool
    window: int | None
    documents: int
    mask: tuple[bool, bool, bool, bool] | None
    softcap: float
    sunk: bool
    layout: str
    seed: int
    workspace: int
    config: S2OConfig

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, length: int, channels: int) -> torch.Tensor:
            x = torch.randn(self.batch, heads, length, channels, generator=generator, dtype=torch.float64)
            return self.lay_out(x.to(dtype).to(device))

        query = draw(self.heads, self.queries, self.channels) * 2
        key = draw(self.groups, self.keys, self.channels)
        return query, key, draw(self.groups, self.keys, self.value_channels)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.groups * self.group

    def visibility(self, device: str = "cpu") -> Visibility:
        """The terms of the mask."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        padding = torch.rand(self.batch, self.keys, generator=generator) < 0.7 if self.padded else None
        documents: list[torch.Tensor | None] = [None, None]
        if self.documents:
            ids = torch.randint(self.documents, (self.batch, max(self.queries, self.keys)), generator=generator)
            ids = ids.sort(dim=1)[0]
            documents = [ids[:, : self.queries].int(), ids[:, ids.shape[1] - self.keys :]]
        mask = None
        if self.mask is not None:
            full = (self.batch, self.heads, self.queries, self.keys)
            shape = [size if whole else 1 for size, whole in zip(full, self.mask, strict=True)]
            mask = self.lay_out(torch.rand(shape, generator=generator) < 0.6)
            mask = mask if self.layout == "contiguous" else mask.expand(full)
        tensors = [None if x is None else x.to(device) for x in (padding, *documents, mask)]
        return Visibility(self.is_causal, self.offset, tensors[0], self.window, *tensors[1:])

    def sinks(self, device: str = "cpu") -> torch.Tensor | None:
        """A sink per head."""
        return torch.linspace(-2, 4, self.heads, device=device) if self.sunk else None

    def arguments(self, device: str = "cpu") -> dict[str, Any]:
        """The operator's arguments but for tensors and fields."""
        return {**self.visibility(device)._asdict(), "softcap": self.softcap, "sinks": self.sinks(device)}

    def lay_out(self, x: torch.Tensor) -> torch.Tensor:
        """The same values with other strides."""
        if self.layout == "heads last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "strided":
            wide = x.new_empty(*x.shape[:2], 2 * x.shape[2], x.shape[3] + 3)
            wide[:, :, ::2, 1:-2] = x
            return wide[:, :, ::2, 1:-2]
        if self.layout == "channels strided":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        return x


def draw_config(choose: Choose, thresholds: Sequence[float] = THRESHOLDS, by_kernels: bool = False) -> S2OConfig:
    """Configurations over all fields, small enough for small calls; `by_kernels`, of rules that have kernels."""
    rule = choose(["sampled", "dropped"] if by_kernels else ["sampled", "sampled", "means", "dropped", "gain", "gain"])
    is_gain = rule == "gain"
    guides = "head" if is_gain else choose(["head", "kv_head"])
    return S2OConfig(
        threshold=choose(thresholds),
        min_length=0,
        last_queries=choose([0, 0, 40]),
        ranking=Ranking(
            rule=rule,
            pool=choose([1, 1, 2, 4, 16]),
            radius=choose([0.0, 0.5, 1.75, 4.0]),
            merge_length=choose([0, 0, 0, 100]),
            guides=guides,
            channels=None if is_gain else choose([None, None, 5, 16]),
            lists="head" if is_gain else choose(["kv_head", "head"]) if guides == "head" else "kv_head",
            measure="mass" if is_gain else choose(["mass", "output"]),
            combine=choose(["max", "mean"]),
            sample=choose([1, 4, 16]),
            segment=choose([16, 32, 64]),
            near_keys=choose([0, 20, 64]),
        ),
    )


def draw_terms(choose: Choose) -> dict[str, Any]:
    """The optional terms of a call, mostly one or none, sometimes all together."""
    chosen = choose(["none", "none", "window", "documents", "mask", "softcap", "sinks", "some", "some"])

    def has(name: str) -> bool:
        return chosen == name or (chosen == "some" and choose(BOOLEANS))

    return {
        "window": choose([1, 7, 40, 100, 1000]) if has("window") else None,
        "documents": choose(range(1, 5)) if has("documents") else 0,
        "mask": tuple(choose(BOOLEANS) for _ in range(4)) if has("mask") else None,
        "softcap": choose([1.5, 20.0, 1e30]) if has("softcap") else 0.0,
        "sunk": has("sinks"),
    }


def draw_call(choose: Choose, longest: int, config: S2OConfig) -> Call:
    """Calls over batches, head counts, ragged lengths, widths, offsets, terms and layouts."""
    queries, keys = choose(range(1, longest + 1)), choose(range(1, longest + 1))
    is_causal = choose(BOOLEANS)
    return Call(
        batch=choose([1, 2]),
        groups=choose([1, 2]),
        group=choose([1, 2, 3, 7]),
        queries=queries,
        keys=keys,
        channels=choose([16, 24, 64]),
        value_channels=choose([16, 40]),
        is_causal=is_causal,
        offset=choose([0, keys - queries, -10, 50]),
        padded=choose(BOOLEANS),
        **draw_terms(choose),
        layout=choose(["contiguous", "heads last", "strided", "channels strided"]),
        seed=choose(range(2**31)),
        workspace=choose([2**30, 2**30, 2**14]),
        config=config,
    )
