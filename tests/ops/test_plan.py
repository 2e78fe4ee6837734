"""The plan of the kernel for Hopper says what the portable kernel would attend."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import S2OConfig
from s2o_compile.ops.geometry import Geometry
from s2o_compile.ops.kernels.plan import FIELDS, plan_kernel
from s2o_compile.ops.visibility import Visibility

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=20)
@given(
    lengths=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    offset=st.integers(-100, 200),
    is_causal=st.booleans(),
    tile=st.sampled_from([16, 32]),
    shape=st.sampled_from([(4, 1, 4), (6, 1, 4), (6, 2, 2), (2, 2, 1)]),
    last_queries=st.sampled_from([0, 50]),
)
def test_items_are_the_tiles_of_a_run(
    lengths: tuple[int, int],
    offset: int,
    is_causal: bool,
    tile: int,
    shape: tuple[int, int, int],
    last_queries: int,
) -> None:
    queries, keys = lengths
    group, lists, heads = shape
    batch, groups = 2, 2
    config = S2OConfig(segment=32, tile=tile, near_keys=70, last_queries=last_queries)
    sizes = torch.empty(batch, group * groups, queries, 16), torch.empty(batch, groups, keys, 16)
    geometry = Geometry.of(*sizes, Visibility(is_causal, offset), config)
    segments = range(geometry.segments // 3, geometry.segments)
    per_segment = 32 // tile
    tiles = range(segments.start * per_segment, min(segments.stop * per_segment, geometry.tiles))
    parts = -(-group // lists // heads)
    items = groups * lists * parts * len(tiles)
    count = torch.randint(100, (batch, groups, lists, len(segments)), dtype=torch.int32, device=DEVICE)
    plan = torch.full((batch, FIELDS.value, items), -1, dtype=torch.int32, device=DEVICE)
    plan_kernel[(-(-items // 16), batch)](
        count, plan, queries, keys, segments.start, len(segments), geometry.ranked_segments, len(tiles), offset,
        geometry.near_keys, groups, items,
        SEGMENT=32, TILE=tile, GROUP=group, LISTS=lists, HEADS=heads, CAUSAL=is_causal, BLOCK_N=16,
    )  # fmt: skip
    want = []
    for b in range(batch):
        for g in range(groups):
            for t in reversed(tiles):
                segment = t // per_segment
                _, low, high = geometry.span(segment)
                end = max(low, geometry.tile_end(t, high))
                for which in range(lists):
                    place = ((b * groups + g) * lists + which) * len(segments) + segment - segments.start
                    last = g * group + (which + 1) * (group // lists)
                    for first in range(last - group // lists, last, heads):
                        listed = int(count[b, g, which, segment - segments.start])
                        want.append([place, g, listed, low, end, t, first, last])
    assert plan.transpose(1, 2).flatten(0, 1).tolist() == want
