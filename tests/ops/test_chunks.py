"""A prompt cut at multiples of the segment gives the bits that it gives whole, if all queries rank in all channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from s2o_compile.ops import AttentionResult, S2OConfig, cpu
from s2o_compile.ops.kernels import pipeline
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility

from .settings import config_of

CONFIG = config_of(threshold=0.05, channels=None, radius=0.0, near_keys=0)
LENGTH = 384
CUTS = [32, 96, 160, 256]

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def by_reference(inputs: Inputs, terms: Visibility, config: S2OConfig) -> AttentionResult:
    return reference_attention(*inputs, terms, config=config)


def by_torch(inputs: Inputs, terms: Visibility, config: S2OConfig) -> AttentionResult:
    return cpu.sparse_attention(*inputs, terms, inputs[0].shape[3] ** -0.5, 0.0, config)


def by_kernels(inputs: Inputs, terms: Visibility, config: S2OConfig) -> AttentionResult:
    return pipeline.sparse_attention(*inputs, terms, inputs[0].shape[3] ** -0.5, 0.0, config)


Attend = Callable[[Inputs, Visibility, S2OConfig], AttentionResult]


def inputs_of(width: int, dtype: torch.dtype) -> Inputs:
    torch.manual_seed(width)
    query, key, value = (torch.randn(1, heads, LENGTH, width, dtype=dtype) for heads in (2, 1, 1))
    return query * 2, key, value


def in_chunks(attend: Attend, inputs: Inputs, cuts: list[int], window: int | None, config: S2OConfig) -> torch.Tensor:
    """The output of a prompt that is cut before these positions."""
    query, key, value = inputs
    parts = []
    for first, end in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        terms = Visibility(is_causal=True, causal_offset=first, window=window)
        chunk = query[:, :, first:end], key[:, :, :end], value[:, :, :end]
        parts.append(attend(chunk, terms, config).output)
    return torch.cat(parts, 2)


@pytest.mark.parametrize(
    ("attend", "dtype", "cuts"),
    [
        *[(by_torch, dtype, [cut]) for dtype in (torch.float32, torch.bfloat16) for cut in CUTS],
        (by_torch, torch.float32, CUTS),
        (by_reference, torch.float32, [160]),
        (by_kernels, torch.float16, [160]),
    ],
)
@pytest.mark.parametrize("window", [None, 200])
def test_cuts_between_segments_change_no_bit(
    attend: Attend, dtype: torch.dtype, cuts: list[int], window: int | None
) -> None:
    inputs = inputs_of(32, dtype)
    whole = attend(inputs, Visibility(is_causal=True, window=window), CONFIG).output
    assert torch.equal(in_chunks(attend, inputs, cuts, window, CONFIG), whole)


@pytest.mark.parametrize(
    "fields", [{"channels": 8, "radius": 0.0}, {"channels": None, "radius": 1.5, "merge_length": 0}]
)
def test_channels_and_distances_of_the_call_make_the_difference(fields: dict[str, Any]) -> None:
    query, key, value = inputs_of(64, torch.float32)
    # Small enough that few channels tell nearly all, so that not all rank after all.
    inputs, config = (query / 4, key, value), config_of(threshold=0.05, near_keys=0, **fields)
    whole = by_torch(inputs, Visibility(is_causal=True), config).output
    assert not torch.equal(in_chunks(by_torch, inputs, [256], None, config), whole)


def test_a_cut_within_a_segment_changes_its_lists_alone() -> None:
    """Of the segments before the cut none changes."""
    inputs = inputs_of(32, torch.float32)
    whole = by_torch(inputs, Visibility(is_causal=True), CONFIG).output
    parts = in_chunks(by_torch, inputs, [200], None, CONFIG)
    assert torch.equal(parts[:, :, :192], whole[:, :, :192])
    assert not torch.equal(parts, whole)
