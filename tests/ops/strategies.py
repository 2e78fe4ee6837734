"""Hypothesis strategies for calls of the operator."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from s2o_compile.ops import S2OConfig

from .drawing import THRESHOLDS, Call, draw_call, draw_config

__all__ = ["Call", "calls", "configs"]


@st.composite
def configs(draw: st.DrawFn, thresholds: Sequence[float] = THRESHOLDS, by_kernels: bool = False) -> S2OConfig:
    """Configurations over all fields, small enough for small calls; `by_kernels`, of rules that have kernels."""
    return draw_config(lambda options: draw(st.sampled_from(options)), thresholds, by_kernels)


@st.composite
def calls(draw: st.DrawFn, longest: int = 300, settings: st.SearchStrategy[S2OConfig] | None = None) -> Call:
    """Calls over batches, head counts, ragged lengths, widths, offsets, terms and layouts."""
    config = draw(configs() if settings is None else settings)
    return draw_call(lambda options: draw(st.sampled_from(options)), longest, config)
