"""The calls that are timed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .._console import UsageError
from ..ops.visibility import Visibility
from ..ops.work import Work, work_of


@dataclass(frozen=True)
class Case:
    """A causal call of the last `queries` of `keys` positions, query heads over KV heads of `channels` each."""

    heads: int
    kv_heads: int
    channels: int
    keys: int
    queries: int
    batch: int = 1
    window: int | None = None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Of query [B, Hq, Lq, D], key [B, Hkv, Lk, D] and value, as key."""
        key = (self.batch, self.kv_heads, self.keys, self.channels)
        return (self.batch, self.heads, self.queries, self.channels), key, key

    @property
    def terms(self) -> Visibility:
        """The mask."""
        return Visibility(True, self.keys - self.queries, window=self.window)

    @property
    def work(self) -> Work:
        """The work of dense attention."""
        return work_of(*self.shapes, self.terms)[0]

    def __str__(self) -> str:
        batch = "" if self.batch == 1 else f"{self.batch} x "
        queries = "" if self.queries == self.keys else f"{self.queries:,} of "
        window = "" if self.window is None else f", window {self.window:,}"
        return f"{batch}{self.heads}/{self.kv_heads}/{self.channels}, {queries}{self.keys:,}{window}"


Shape = tuple[int, int, int]
"""Query heads, KV heads and channels."""

MOST_WORK = 2e13
"""Longer calls are left out of a sweep: at a hundred times the work from which sparse attention pays, all is said."""

_SHAPES: dict[str, list[Shape]] = {
    # One number of query heads per KV head and one of channels each, so that the kernels are compiled once for all.
    "cuda": [(32, 8, 128), (8, 2, 128), (96, 24, 128), (9, 3, 64), (24, 8, 64)],
    "cpu": [(4, 1, 128), (3, 1, 64)],
}
_LENGTHS = {"cuda": [4096, 6144, 8192, 12_288, 16_384, 32_768], "cpu": [2048, 4096, 6144, 8192, 12_288, 16_384]}
_QUICK_LENGTHS = {"cuda": [4096, 8192, 12_288, 24_576], "cpu": [2048, 4096, 8192]}
_CHUNKS = [48, 128, 512]
"""Queries of calls on a CPU that see many keys in little work."""

_SWEEP_SHAPES: list[Shape] = [
    (9, 3, 64), (12, 2, 128), (16, 8, 256), (28, 4, 128), (32, 8, 64), (32, 8, 96), (32, 8, 128),
]  # fmt: skip
_SWEEP_LENGTHS = [2048, 4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768, 65_536, 131_072]
_SWEEP_BATCHES = [1, 4]
_SWEEP_WINDOWS = [None, 512, 4096]


def usual_cases(device: torch.device, is_quick: bool) -> list[Case]:
    """What tells from where on sparse attention pays; the first tell most."""
    kind = device.type
    shapes, lengths = _SHAPES[kind], (_QUICK_LENGTHS if is_quick else _LENGTHS)[kind]
    shapes = [shape for shape in shapes if shape[2] == shapes[0][2]] if is_quick else shapes
    cases = crossed(shapes, lengths, [1], [None])
    chunks = [Case(*shape, max(lengths), queries) for shape in shapes for queries in _CHUNKS if kind == "cpu"]
    return [case for case in [*cases, *chunks] if case.work.multiply_adds <= MOST_WORK]


def sweep(
    shapes: Sequence[Shape] = (),
    lengths: Sequence[int] = (),
    batches: Sequence[int] = (),
    windows: Sequence[int | None] = (),
) -> list[Case]:
    """All of what is given crossed, or left out, the shapes of well-known models; of calls of up to `MOST_WORK`."""
    cases = crossed(
        shapes or _SWEEP_SHAPES, lengths or _SWEEP_LENGTHS, batches or _SWEEP_BATCHES, windows or _SWEEP_WINDOWS
    )
    return [case for case in cases if case.work.multiply_adds <= MOST_WORK]


def crossed(
    shapes: Sequence[Shape], lengths: Sequence[int], batches: Sequence[int], windows: Sequence[int | None]
) -> list[Case]:
    """Whole prefills of each shape, window, batch and length; the longest last, and no window that hides nothing."""

    def cases() -> Iterator[Case]:
        for shape, window, length, batch in itertools.product(shapes, windows, sorted(lengths), batches):
            if window is None or window < length:
                yield Case(*shape, length, length, batch, window)

    return list(cases())


def read_shape(text: str) -> Shape:
    """The shape that 32/8/128 says.

    Raises:
        UsageError: It says none.
    """
    found = re.fullmatch(r"(\d+)/(\d+)/(\d+)", text)
    heads, kv_heads, channels = map(int, found.groups()) if found else (0, 0, 0)
    if not (kv_heads and channels and heads and heads % kv_heads == 0):
        raise UsageError(f"--shape takes query heads/KV heads/channels, such as 32/8/128, not {text!r}.")
    return heads, kv_heads, channels
