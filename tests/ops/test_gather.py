"""The kernel that brings rows together from pages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops.kernels.gather import gather

from ..examples import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.hypothesis
@settings(max_examples=examples(15), deadline=None)
@given(
    st.tuples(st.sampled_from([1, 16, 7]), st.integers(1, 3), st.sampled_from([1, 40, 64])),
    st.integers(1, 90),
    st.permutations([0, 1, 2, 3]),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.sampled_from([1, 100_000]),
    st.integers(1, 2),
)
def test_rows_are_those_of_the_pages(
    shape: tuple[int, int, int], rows: int, order: list[int], dtype: torch.dtype, queries: int, table_stride: int
) -> None:
    """Of pools of any strides, NaN where nothing may be read, and no row beyond those that are asked for."""
    size, heads, channels = shape
    pages = -(-rows // size)
    sizes = (pages + 5, size, heads, channels + 3)
    pool = torch.full([sizes[n] for n in order], torch.nan).permute([order.index(n) for n in range(4)])
    pool = pool.to(DEVICE, dtype)[..., 1:-2]
    used = torch.randperm(len(pool), device=DEVICE)[:pages]
    pool[used] = torch.randn(pages, size, heads, channels, device=DEVICE).to(dtype)
    table = torch.zeros(pages, table_stride, dtype=torch.int32, device=DEVICE)
    table[:, 0] = used
    out = torch.full((rows + 1, heads, channels), 7.0, dtype=dtype, device=DEVICE)
    gather(out[:rows], pool, table[:, 0], queries)
    assert torch.equal(out[:rows], pool[used].flatten(0, 1)[:rows])
    assert (out[rows] == 7).all()
