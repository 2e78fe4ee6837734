"""From how much work on sparse attention pays, by device: docs/decisions/005-when-calls-run-dense.md."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from . import tuned
from .devices import AMX, AVX512, OTHER_CPU, kind_of, name_of
from .sizes import statically_known_true
from .work import Size


class BreakEven(NamedTuple):
    """What a call must have at least for sparse attention to pay.

    Attributes:
        work: Multiply-adds of dense attention, `Work.multiply_adds`: what the host and the launches take.
        keys: Keys that a query sees, the mean over queries: fewer leave too little out.
        source: The file that says so, or the kind of device that it was measured on or reasoned for.
    """

    work: float
    keys: float
    source: str

    def for_channels(self, device: torch.device, channels: Size) -> BreakEven:
        """The same for heads of so many channels."""
        is_wide = device.type == "cuda" and statically_known_true(channels > MOST_CHANNELS)
        return self._replace(keys=self.keys * _WIDE) if is_wide else self

    @property
    def is_never(self) -> bool:
        """Whether no call pays."""
        return math.inf in (self.work, self.keys)

    @property
    def is_shipped(self) -> bool:
        """Whether this is the limit of a kind of device, not one that was measured here."""
        return self.source.startswith(_SHIPPED_FOR)


AMX_FLOAT32 = f"{AMX}, float32"
SHIPPED = {
    AMX: (5e8, 20480.0),  # In half precision, which SDPA multiplies on AMX and the operator does not.
    AMX_FLOAT32: (5e8, 6144.0),
    AVX512: (5e8, 3072.0),
    OTHER_CPU: (5e8, 16384.0),
    "sm_80": (2e11, 6144.0),
    "sm_89": (1.5e11, 4096.0),
    "sm_90": (2.3e11, 5120.0),
}
"""The least work and the fewest keys, by kind of device; those of sm_80, sm_89 and AMX in float32 are reasoned."""
MOST_CHANNELS = 128
"""Channels of a head up to which a GPU ranks keys in float8, and large blocks of them fit into shared memory."""
_SHIPPED_FOR = "shipped for"
_WIDE = 4
"""How many times the keys a query must see on a GPU where a head has more channels."""


@functools.cache
def break_even(device: torch.device, dtype: torch.dtype) -> BreakEven:
    """The break-even of a device for a dtype: measured there by ``s2o tune``, or else as shipped for its kind."""
    found = tuned.read(name_of(device), dtype)
    return shipped(device, dtype) if found is None else BreakEven(found[0], found[1], str(found[2]))


def shipped(device: torch.device, dtype: torch.dtype) -> BreakEven:
    """As shipped for its kind; a GPU that is not listed has that of the latest before it, or of the first."""
    kind = kind_of(device)
    if kind == AMX and dtype == torch.float32:
        kind = AMX_FLOAT32
    if kind not in SHIPPED:
        known = [name for name in SHIPPED if name.startswith("sm_")]
        kind = max((name for name in known if _number(name) <= _number(kind)), key=_number, default=known[0])
    return BreakEven(*SHIPPED[kind], source=f"{_SHIPPED_FOR} {kind}")


def _number(kind: str) -> int:
    return int(kind.removeprefix("sm_"))
