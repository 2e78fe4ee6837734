"""How the benchmark of calibrations sums up what it measured."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.calibration import GRID, HeldOut, Point, Row, by_group, one_threshold, rows


def curve(*factors: float) -> list[Point]:
    """A call whose groups have errors of these factors times the threshold, and densities that fall with it."""
    return [Point([factor * 0.01 / t**0.5 for factor in factors], [factor * t for factor in factors]) for t in GRID]


def test_one_threshold_for_all() -> None:
    curves = [curve(0.1, 0.1), curve(0.3, 0.1)]
    target = statistics.mean(sum(points[3].error) for points in curves)
    for found, points in zip(one_threshold(curves, target), curves, strict=True):
        assert found == pytest.approx(points[3].all)
    between = one_threshold(curves, target * 1.2)
    assert statistics.mean(error for _, error in between) == pytest.approx(target * 1.2)


def test_thresholds_by_group_save_where_groups_differ() -> None:
    assert by_group(curve(0.2, 0.2), 0.01) == pytest.approx(1, abs=0.01)
    steep = [Point([0.5, 0.5 - place / 20], [10 * t, 1e-4 * t]) for place, t in enumerate(GRID)]
    assert by_group(steep, 0.05) < 0.8
    assert by_group(curve(9.0), 1e-9) == 1


def test_rows_count_what_is_within() -> None:
    row = Row.of(0.01, "rule", [(0.1, 0.005), (0.2, 0.015), (0.3, 0.03)])
    assert (row.median, row.worst, row.density) == pytest.approx((1.5, 3, 0.2))
    assert row.within == pytest.approx(2 / 3)


def test_no_threshold_for_all_has_no_error() -> None:
    """Where a calibration leaves every site dense, there is no mean error to compare at."""
    dense, points = Point([1.0], [0.0]), curve(0.1)
    found = {row.rule: row for row in rows([HeldOut("site", {0.01: dense}, {0.01: points[2]}, points)], 0.01)}
    assert found.keys() == {"calibrated", "the budget as threshold"}
    assert (found["calibrated"].worst, found["calibrated"].density) == (0, 1)
