"""The blocks of kernels fit into a GPU's shared memory."""

from __future__ import annotations

import pytest

from s2o_compile.ops.kernels.tiling import SHARED_MEMORY, importance_tiling, ranking_tiling, rows_per_list


@pytest.mark.parametrize("heads", [1, 4, 7, 8, 16, 64, 71])
@pytest.mark.parametrize("channels, itemsize", [(32, 1), (128, 1), (64, 2), (128, 2), (256, 2), (256, 4)])
def test_guides_of_many_heads_fit(heads: int, channels: int, itemsize: int) -> None:
    guides = 32 * heads
    tiling = importance_tiling(channels, itemsize, guides)
    rows = rows_per_list(guides, tiling.rows)
    blocks = -(-guides // rows)
    if blocks == 1:
        assert tiling == ranking_tiling(channels, itemsize)
    else:
        waiting = tiling.num_stages * (blocks * rows + tiling.keys) * channels * itemsize
        assert waiting <= SHARED_MEMORY or tiling.num_stages == 1
