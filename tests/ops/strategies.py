"""Hypothesis strategies for calls of the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from s2o_compile.ops import S2OConfig
from s2o_compile.ops.geometry import Geometry


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
    layout: str
    seed: int
    config: S2OConfig

    def tensors(
        self, dtype: torch.dtype = torch.float32, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Query, key, value and key padding."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, length: int, channels: int) -> torch.Tensor:
            x = torch.randn(self.batch, heads, length, channels, generator=generator, dtype=torch.float64)
            return self.lay_out(x.to(dtype).to(device))

        query = draw(self.groups * self.group, self.queries, self.channels) * 2
        key = draw(self.groups, self.keys, self.channels)
        value = draw(self.groups, self.keys, self.value_channels)
        padding = torch.rand(self.batch, self.keys, generator=generator) < 0.7 if self.padded else None
        return query, key, value, None if padding is None else padding.to(device)

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

    def mask(self, padding: torch.Tensor | None, device: str = "cpu") -> torch.Tensor:
        """What each row may see [B or 1, 1, Lq, Lk]."""
        seen = torch.ones(1, 1, self.queries, self.keys, dtype=torch.bool, device=device)
        if self.is_causal:
            rows = torch.arange(self.queries, device=device)[:, None] + self.offset
            seen = seen & (torch.arange(self.keys, device=device) <= rows)
        return seen if padding is None else seen & padding[:, None, None]

    def geometry(self, query: torch.Tensor, key: torch.Tensor) -> Geometry:
        """The call's geometry."""
        return Geometry.of(query, key, self.is_causal, self.offset, self.config)

    @property
    def masks(self) -> dict[str, Any]:
        """The operator's arguments that mask, but for padding."""
        return {"is_causal": self.is_causal, "causal_offset": self.offset}


@st.composite
def configs(draw: st.DrawFn, thresholds: tuple[float, ...] = (0.0, 1e-3, 1e-2, 5e-2)) -> S2OConfig:
    """Configurations over all fields, small enough for small calls."""
    stop = draw(st.sampled_from(["importance", "importance", "gain"]))
    guides = "head" if stop == "gain" else draw(st.sampled_from(["head", "group"]))
    lists = "head" if stop == "gain" else draw(st.sampled_from(["group", "head"])) if guides == "head" else "group"
    segment = draw(st.sampled_from([16, 32, 64]))
    mean_weight = draw(st.sampled_from([0.0, 3.0]))
    return S2OConfig(
        threshold=draw(st.sampled_from(thresholds)),
        min_length=0,
        segment=segment,
        tile=draw(st.sampled_from([t for t in (16, 32, 64) if t <= segment])),
        pool=draw(st.sampled_from([1, 2, 4, 16])),
        guides=guides,
        lists=lists,
        max_weight=draw(st.sampled_from([1.0, 0.5, 0.0] if mean_weight else [1.0, 0.5])),
        mean_weight=mean_weight,
        sample=draw(st.sampled_from([1, 4, 16])),
        stop=stop,
        chunk=64,
        first_keys=draw(st.sampled_from([0, 1, 5])),
        near_keys=draw(st.sampled_from([0, 20, 64])),
        last_queries=draw(st.sampled_from([0, 0, 40])),
        tail="none" if stop == "gain" else draw(st.sampled_from(["sampled", "means", "none"])),
    )


@st.composite
def calls(draw: st.DrawFn, longest: int = 300, settings: st.SearchStrategy[S2OConfig] | None = None) -> Call:
    """Calls over batches, head counts, ragged lengths, widths, offsets, padding and layouts."""
    queries, keys = draw(st.integers(1, longest)), draw(st.integers(1, longest))
    is_causal = draw(st.booleans())
    return Call(
        batch=draw(st.integers(1, 2)),
        groups=draw(st.integers(1, 2)),
        group=draw(st.sampled_from([1, 2, 3, 7])),
        queries=queries,
        keys=keys,
        channels=draw(st.sampled_from([16, 24, 64])),
        value_channels=draw(st.sampled_from([16, 40])),
        is_causal=is_causal,
        offset=draw(st.sampled_from([0, keys - queries, -10, 50])) if is_causal else 0,
        padded=draw(st.booleans()),
        layout=draw(st.sampled_from(["contiguous", "heads last", "strided", "channels strided"])),
        seed=draw(st.integers(0, 2**31)),
        config=draw(configs() if settings is None else settings),
    )
