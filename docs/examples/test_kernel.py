"""Test an implementation of the operator against its specification, on calls that hypothesis makes up.

python -m pytest docs/examples/test_kernel.py

`implementation` is the operator on a CPU; put a kernel of your own there. In float64 both choose the same keys and
agree to rounding; in lower precision a key whose importance is the threshold to rounding may go either way.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile import Ranking, S2OConfig
from s2o_compile.ops.cpu import sparse_attention as implementation
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 150),
    cached=st.integers(0, 100),
    group=st.integers(1, 3),
    channels=st.sampled_from([16, 40, 64]),
    window=st.none() | st.integers(1, 200),
    threshold=st.sampled_from([0.0, 1e-3, 1e-2, 0.3]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_the_reference(
    queries: int, cached: int, group: int, channels: int, window: int | None, threshold: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, length, channels, generator=generator, dtype=torch.float64)
        for heads, length in ((2 * group, queries), (2, cached + queries), (2, cached + queries))
    )
    visibility = Visibility(is_causal=True, causal_offset=cached, window=window)
    config = S2OConfig(threshold=threshold, ranking=Ranking(near_keys=0))

    got = implementation(query, key, value, visibility, channels**-0.5, 0.0, config)
    want = reference_attention(query, key, value, visibility, config=config)

    assert torch.equal(got.visited, want.visited)
    torch.testing.assert_close(got.output, want.output, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got.lse.double(), want.lse, atol=1e-5, rtol=1e-5)
