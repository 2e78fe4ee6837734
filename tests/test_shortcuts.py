"""With the shortcuts of tests the interpreter computes what it computes without."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from s2o_compile.ops.kernels.products import larger


@triton.jit
def reduce_kernel(source, target, AXIS: tl.constexpr):
    """The largest numbers of [2, 4, 8] along an axis."""
    place = tl.arange(0, 2)[:, None, None] * 32 + tl.arange(0, 4)[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    largest = tl.reshape(tl.reduce(tl.load(source + place), AXIS, larger), [64 // place.shape[AXIS]])
    tl.store(target + tl.arange(0, 64 // place.shape[AXIS]), largest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiles kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_reductions(axis: int, dtype: torch.dtype) -> None:
    torch.manual_seed(axis)
    source = torch.randn(2, 4, 8).to(dtype)
    source[1, 2, 3], source[0, 1, 7] = torch.nan, torch.inf
    want = source.amax(axis)
    got = torch.empty_like(want)
    reduce_kernel[(1,)](source, got, axis)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
