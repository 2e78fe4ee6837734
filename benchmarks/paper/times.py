"""The claims about time against FlashAttention-2, on random inputs of which a given density is visited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend

from s2o_compile.ops.dispatch import has_kernels
from s2o_compile.ops.visibility import Visibility

from ..prefill.backends import EAGER, S2O, Contenders, preferring
from ..prefill.calls import plain_calls
from ..prefill.measure import measure as measure_prefills
from ..prefill.models import Subject
from ..speed.measure import Case
from ..speed.measure import measure as measure_calls
from .claims import ATTENTION, PREFILL, SETTINGS, Row

CAUSAL = Visibility(is_causal=True)
TIMED = {name: replace(one, min_length=0) for name, one in SETTINGS.items() if has_kernels(CAUSAL, one)}
"""The settings that have kernels for a GPU, as the published rule has none, for calls that all run sparse."""
FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    shape: str, length: int, density: float, device: torch.device, dtype: torch.dtype, repetitions: int,
    progress: Callable[[str], None],
) -> Iterator[Row]:  # fmt: skip
    """One call of each setting beside FlashAttention-2."""
    case = Case(shape, length, density, TIMED, ("flash",), length, device, dtype)
    for row in measure_calls(case, repetitions, progress):
        if row.name != "flash":
            seconds = None if row.milliseconds is None else row.milliseconds / 1e3
            yield Row(
                ATTENTION, f"{shape}, {length:,} tokens", row.name.removeprefix("s2o, "), row.ratio,
                density=row.density, error=row.error, seconds=seconds, reason=row.reason,
            )  # fmt: skip


def prefill(
    subject: Subject, length: int, density: float, repetitions: int, progress: Callable[[str], None]
) -> Iterator[Row]:
    """A prefill with each setting, compiled, beside the model as it is, which then attends by FlashAttention-2."""
    tokens = subject.tokens(length, None)
    contenders = Contenders(subject.model, (EAGER, S2O))
    for name, config in TIMED.items():
        calls = plain_calls(tokens, (False,))
        with preferring(FLASH_FIRST):
            found = measure_prefills(contenders, tokens, calls, config, density, repetitions, False, progress)
        rows = {row.backend: row for row in found}
        eager, ours = rows[EAGER], rows[S2O]
        ratio = eager.seconds / ours.seconds if eager.seconds and ours.seconds else None
        yield Row(
            PREFILL, f"{subject.name}, {length:,} tokens", name, ratio,
            density=ours.density, seconds=ours.seconds, reason=ours.reason or eager.reason,
        )  # fmt: skip
