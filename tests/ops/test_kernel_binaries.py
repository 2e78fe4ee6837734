"""The Triton kernels compile for GPUs, whether or not there is one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from .build_kernels import is_reduced_right, linear_reductions, shuffled_products

PLAIN = {
    "moments_kernel", "normaliser_kernel", "sample_kernel", "positions_kernel", "attend_kernel", "decode_kernel",
    "sum_kernel",
}  # fmt: skip
BY_EVERY_QUERY = {"importance_kernel"}
MERGING = {"covariance_kernel", "distance_kernel", "cluster_kernel", "mean_kernel", "merged_importance_kernel"}
IN_HALF_PRECISION = {"choose_kernel", "dense_kernel"}
WITHOUT_FLOAT8 = {"pick_kernel"}
WITH_FLOAT8 = {"pool_kernel", "select_kernel", "origin_kernel", "reach_kernel", "quantise_kernel"}


@pytest.mark.parametrize("calls", ["some", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "capability"), [("float16", 80), pytest.param("float32", 89, marks=pytest.mark.slow), ("bfloat16", 90)]
)
def test_kernels_compile_for_gpus(dtype: str, capability: int, calls: str) -> None:
    """In a process of its own: here they may be interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.build_kernels", dtype, str(capability), calls]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    wanted = set(PLAIN)
    if dtype != "float32" or calls == "all":
        wanted |= BY_EVERY_QUERY
    if dtype != "float16" or calls == "all":
        wanted |= MERGING
    if dtype != "float32":
        wanted |= IN_HALF_PRECISION
    if dtype == "bfloat16":
        wanted |= WITH_FLOAT8 | {"fold_kernel"}
    if dtype == "float16" or (dtype == "bfloat16" and calls == "all"):
        wanted |= WITHOUT_FLOAT8
    assert set(run.stdout.split()) == wanted


def test_reductions_that_triton_gets_wrong_are_seen() -> None:
    """A layout as Triton 3.6 chose it, whose sums over the last axis an H200 got wrong; and one with lanes in order."""
    wrong = "lane = [[0, 0, 1], [0, 1, 0], [0, 0, 2]], warp = [[0, 0, 4], [0, 0, 8]]"
    right = "lane = [[0, 0, 1], [0, 0, 2], [0, 1, 0]], warp = [[0, 0, 4], [0, 0, 8]]"
    for layout, axes in ((wrong, {2}), (right, set())):
        reductions = "\n".join(
            f"""%1 = "tt.reduce"(%0) <{{axis = {axis} : i32}}> ({{
                tt.reduce.return %2 : f16 loc(#loc1)
            }}) : (tensor<64x2x16xf16, #linear>) -> tensor<64x2xf16> loc(#loc1)"""
            for axis in (0, 2)
        )
        ttgir = f"#linear = #ttg.linear<{{register = [[1, 0, 0]], {layout}, block = []}}>\n{reductions}"
        found = list(linear_reductions(ttgir))
        assert [axis for axis, _ in found] == [0, 2]
        assert {axis for axis, bases in found if not is_reduced_right(axis, bases)} == axes


def test_sums_that_may_differ_by_lane_are_seen() -> None:
    """A product, which its own lane may add before it is rounded; what was added before has been rounded."""
    ptx = """
        {made}.f32 %r3, %r1, %r2;
        mov.b32 %r4, %r3;
        shfl.sync.bfly.b32 %r5|%p1, %r4, 2, 31, -1;
        fma.rn.f32 %r6, %r1, %r2, %r5;
    """
    assert shuffled_products(ptx.format(made="mul")) == ["%r4, 2, 31, -1"]
    assert not shuffled_products(ptx.format(made="mul.rn"))
    assert not shuffled_products(ptx.format(made="add"))


def test_calls_of_other_lengths_need_no_other_binaries() -> None:
    """In a process of its own, without a GPU or a compilation."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.count_variants"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    *again, number = run.stdout.splitlines()
    assert not again
    assert int(number) > 20
