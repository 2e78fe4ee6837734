"""Where the spans of segments lie."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from s2o_compile.ops.geometry import BLOCK, Geometry
from s2o_compile.ops.visibility import Visibility

geometries = st.builds(
    Geometry,
    queries=st.integers(1, 400),
    keys=st.integers(1, 400),
    is_causal=st.booleans(),
    offset=st.integers(-300, 500),
    window=st.none() | st.integers(1, 500),
    segment=st.sampled_from([16, 32, 64]),
    tile=st.just(16),
    near_keys=st.sampled_from([0, 5, 64, 500]),
    last_queries=st.sampled_from([0, 1, 50, 2**62]),
)


@given(geometries, st.integers(0, 3))
def test_spans_of_many_segments_are_those_of_each(geometry: Geometry, first: int) -> None:
    segments = range(min(first, geometry.segments), geometry.segments)
    spans = geometry.spans(segments, torch.device("cpu"))
    assert spans.tolist() == [list(geometry.span(segment)) for segment in segments]


@given(geometries)
def test_every_visible_key_is_dense_or_history(geometry: Geometry) -> None:
    """And no key is both; histories are whole blocks."""
    positions, rows = torch.arange(geometry.keys), torch.arange(geometry.queries)[:, None]
    seen = Visibility(geometry.is_causal, geometry.offset, window=geometry.window).seen(0, 0, rows, positions)
    spans = geometry.spans(range(geometry.segments), positions.device)
    start, low, high = spans[:, :, None].unbind(1)
    dense, history = (positions >= low) & (positions < high), geometry.history(positions, spans)
    assert not (dense & history).any()
    assert not (start % BLOCK).any() and not (low % BLOCK)[low < geometry.keys].any()
    of_row = torch.arange(geometry.queries) // geometry.segment
    assert not (seen & ~(dense | history)[of_row]).any()
