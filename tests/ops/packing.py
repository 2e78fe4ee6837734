"""Packed and paged calls of the operator: requests in one call, with NaN wherever nothing may be read."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

from .comparison import dense, largest_difference

NOTHING = torch.nan
LAYOUTS = ("NHD", "HND", "side by side", "every second page", "channels strided")
BLOCK_SIZES = (1, 5, 16, 32, 64, 256)
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Packing:
    """A call of many requests, described by sizes, so that a failing example prints as something to read.

    `lengths` are the queries and keys of each request; `block_size` is None where keys are packed, with `slack` unused
    slots after those of each request; `shared` requests have the pages of the first one as far as these are full.
    """

    lengths: tuple[tuple[int, int], ...]
    kv_heads: int
    per_kv_head: int
    channels: int
    value_channels: int
    block_size: int | None
    layout: str
    slack: int
    shared: bool
    window_size: tuple[int, int]
    softcap: float
    sunk: bool
    scale: float | None
    padding: int
    seed: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv_heads * self.per_kv_head

    @property
    def rows(self) -> list[slice]:
        """The queries of each request."""
        starts = _starts([queries for queries, _ in self.lengths])
        return [slice(*ends) for ends in itertools.pairwise(starts)]

    def sinks(self, device: str = "cpu") -> torch.Tensor | None:
        """A sink per head."""
        return torch.linspace(-2, 4, self.heads, device=device) if self.sunk else None

    def requests(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Operands]:
        """Query [Lq, Hq, D], key [Lk, Hkv, D] and value [Lk, Hkv, Dv] of each request."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(length: int, heads: int, channels: int) -> torch.Tensor:
            return torch.randn(length, heads, channels, generator=generator).to(device, dtype)

        found: list[Operands] = []
        for queries, keys in self.lengths:
            query = draw(queries, self.heads, self.channels) * 2
            key, value = (draw(keys, self.kv_heads, width) for width in (self.channels, self.value_channels))
            if found and (count := self.shared_keys(keys)):
                key[:count], value[:count] = found[0][1][:count], found[0][2][:count]
            found.append((query, key, value))
        return found

    def shared_keys(self, keys: int) -> int:
        """How many of a later request's `keys` are those of the first request, in its pages."""
        if not self.shared or self.block_size is None:
            return 0
        return min(keys, self.lengths[0][1]) // self.block_size * self.block_size

    def arguments(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """The arguments of `s2o_compile.attention_varlen`, but for `config`."""
        requests = self.requests(device, dtype)
        trailing = torch.full((self.padding, self.heads, self.channels), NOTHING, device=device, dtype=dtype)
        queries, keys = ([pair[i] for pair in self.lengths] for i in (0, 1))
        return {
            "query": torch.cat([*(query for query, _, _ in requests), trailing]),
            "cu_seq_q": torch.tensor(_starts(queries), dtype=torch.int32),
            "max_q": max(queries, default=0),
            "max_k": max(keys, default=0) + 3,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "sinks": self.sinks(device),
            "scale": self.scale,
            **(self._packed(requests) if self.block_size is None else self._paged(requests)),
        }

    def _packed(self, requests: list[Operands]) -> dict[str, Any]:
        keys = [len(key) for _, key, _ in requests]
        starts = _starts([count + self.slack for count in keys])
        key, value = (
            _pool((starts[-1] + 7, self.kv_heads), width, requests[0][0])
            for width in (self.channels, self.value_channels)
        )
        for start, (_, of_key, of_value) in zip(starts, requests, strict=False):
            key[start : start + len(of_key)], value[start : start + len(of_key)] = of_key, of_value
        used = torch.tensor(keys) if self.slack else None
        return {"key": key, "value": value, "cu_seq_k": torch.tensor(starts), "seqused_k": used}

    def _paged(self, requests: list[Operands]) -> dict[str, Any]:
        assert self.block_size is not None
        size, like = self.block_size, requests[0][0]
        counts = [-(-len(key) // size) for _, key, _ in requests]
        free = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(self.seed)).tolist()
        key, value = self._pools(len(free), size, like)
        # Entries beyond the last page may be anything.
        table = torch.full((len(requests), max(counts) + 2), -1 if self.seed % 2 else 2**31 - 1, dtype=torch.int32)
        for number, (_, of_key, of_value) in enumerate(requests):
            shared = self.shared_keys(len(of_key)) // size if number else 0
            pages = table[0, :shared].tolist() + [free.pop() for _ in range(counts[number] - shared)]
            table[number, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            for place, page in enumerate(pages):
                part = slice(place * size, (place + 1) * size)
                key[page, : len(of_key[part])], value[page, : len(of_key[part])] = of_key[part], of_value[part]
        used = torch.tensor([len(of_key) for _, of_key, _ in requests], dtype=torch.int32)
        tensors = {"key": key, "value": value, "block_table": table.to(like.device)}
        return {**tensors, "cu_seq_k": None, "seqused_k": used}

    def _pools(self, pages: int, size: int, like: torch.Tensor) -> list[torch.Tensor]:
        """Keys and values [pages, size, Hkv, D], of nothing yet."""
        heads, widths = self.kv_heads, (self.channels, self.value_channels)
        if self.layout == "side by side":
            return list(_pool((pages, heads, size), sum(widths), like).transpose(1, 2).split(widths, -1))
        layouts: dict[str, Callable[[int], torch.Tensor]] = {
            "NHD": lambda width: _pool((pages, size, heads), width, like),
            "HND": lambda width: _pool((pages, heads, size), width, like).transpose(1, 2),
            "every second page": lambda width: _pool((2 * pages, size, heads), width, like)[::2],
            "channels strided": lambda width: _pool((pages, size, width), heads, like).transpose(2, 3),
        }
        return [layouts[self.layout](width) for width in widths]


def _pool(shape: tuple[int, ...], width: int, like: torch.Tensor) -> torch.Tensor:
    return like.new_full((*shape, width), NOTHING)


def _starts(lengths: list[int]) -> list[int]:
    return [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]


BATCH = Packing(
    lengths=((1, 90), (200, 200), (0, 40), (1, 1), (64, 301), (0, 0), (17, 17)),
    kv_heads=2,
    per_kv_head=2,
    channels=16,
    value_channels=24,
    block_size=16,
    layout="HND",
    slack=0,
    shared=True,
    window_size=(-1, 0),
    softcap=0.0,
    sunk=False,
    scale=None,
    padding=5,
    seed=1,
)
"""Decoding requests, first chunks, a chunk with a past, requests of nothing."""


@st.composite
def packings(draw: st.DrawFn, longest: int = 200) -> Packing:
    """Calls over ragged requests: decoding, empty, with a past, without one, with more queries than keys."""
    lengths = []
    for _ in range(draw(st.integers(1, 5))):
        queries = draw(st.sampled_from([0, 1, 1, 3, 33, 100, longest]))
        past = draw(st.sampled_from([0, 0, 1, 31, 64, longest]))
        lengths.append((queries, max(0, queries + past - draw(st.sampled_from([0, 0, 0, 5, 400])))))
    return Packing(
        lengths=tuple(lengths),
        kv_heads=draw(st.integers(1, 2)),
        per_kv_head=draw(st.integers(1, 3)),
        channels=draw(st.sampled_from([16, 24])),
        value_channels=draw(st.sampled_from([16, 40])),
        block_size=draw(st.sampled_from([None, *BLOCK_SIZES])),
        layout=draw(st.sampled_from(LAYOUTS)),
        slack=draw(st.sampled_from([0, 0, 9])),
        shared=draw(st.booleans()),
        window_size=draw(st.sampled_from([(-1, 0), (-1, 0), (-1, -1), (0, 0), (20, 0), (70, -1), (5, 9), (-1, 4)])),
        softcap=draw(st.sampled_from([0.0, 0.0, 4.0])),
        sunk=draw(st.booleans()),
        scale=draw(st.sampled_from([None, None, 0.3, -0.2])),
        padding=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**16)),
    )


def visible(queries: int, keys: int, window_size: tuple[int, int], device: str) -> torch.Tensor:
    """What flash_attn's documentation says that a window shows, aligned at the bottom right, [Lq, Lk]."""
    left, right = window_size
    ahead = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None] - (keys - queries)
    return (ahead <= (right if right >= 0 else queries + keys)) & (ahead >= (-left if left >= 0 else -(queries + keys)))


def dense_of(call: Packing, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Dense attention of each request alone in float64, [Lq, Hq, Dv]."""
    outputs = []
    for operands in call.requests(device, dtype):
        mask = visible(len(operands[0]), len(operands[1]), call.window_size, device)
        alone = [x.transpose(0, 1)[None] for x in operands]
        outputs.append(dense(*alone, mask, call.scale, call.softcap, call.sinks(device))[0].transpose(0, 1))
    return outputs


def assert_rows(call: Packing, got: torch.Tensor, want: Sequence[torch.Tensor], tolerance: float) -> None:
    """Compare all requests, and that what belongs to none of them is zero."""
    for rows, of_request in zip(call.rows, want, strict=True):
        assert largest_difference(got[rows], of_request) <= tolerance
    assert not got[sum(queries for queries, _ in call.lengths) :].any()
