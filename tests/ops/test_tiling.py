"""The blocks of kernels fit into a GPU's shared memory."""

from __future__ import annotations

import pytest

from s2o_compile.ops.kernels.tiling import MAX_GUIDE_BYTES, SHARED_MEMORY, importance_tiling


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 7, 8, 16, 64, 71])
@pytest.mark.parametrize(
    "channels, itemsize, half", [(32, 1, True), (128, 1, True), (128, 1, False), (64, 2, False), (256, 4, False)]
)
def test_guides_of_many_heads_fit(heads: int, channels: int, itemsize: int, half: bool) -> None:
    guides = 32 * heads
    tiling, rest, resident = importance_tiling(channels, itemsize, guides, half)
    parts = -(-guides // tiling.rows)
    rows = parts * tiling.rows if rest == 0 else (parts - 1) * tiling.rows + rest
    assert guides <= rows < guides + tiling.rows
    key_bytes = tiling.num_stages * tiling.keys * channels * itemsize
    if resident:
        assert parts == 1 or rows * channels * itemsize <= MAX_GUIDE_BYTES
        assert rows * channels * itemsize + key_bytes <= SHARED_MEMORY + MAX_GUIDE_BYTES
    else:
        assert tiling.num_stages * rows * channels * itemsize + key_bytes <= SHARED_MEMORY or tiling.num_stages == 1
