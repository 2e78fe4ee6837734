"""The benchmark of calibrations: what it measures of calls, and how it sums that up."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from benchmarks.calibration import DENSE, GRID, HeldOut, calibrate_each, measure_texts, one_threshold, rows
from s2o_compile import S2OConfig, attention
from s2o_compile.calibration.sites import Measurement, SiteInputs, visit_sites

from ..passes.models import tiny, tokens

BUDGET = 0.01


def curve(factor: float) -> list[Measurement]:
    """A call whose errors are this factor times the threshold, and whose density falls with it."""
    return [Measurement(threshold, 0.01 / threshold**0.5, factor * threshold) for threshold in GRID]


def held_out(error: float, density: float = 0.1) -> HeldOut:
    return HeldOut(1, f"layer {error}", {"calibrated": [Measurement(0.1, density, error)]}, curve(0.1))


def test_one_threshold_for_all() -> None:
    curves = [curve(0.1), curve(0.3)]
    assert [point.threshold for point in one_threshold(curves, 0.2 * GRID[3])] == pytest.approx([GRID[3]] * 2)
    for target in (0.1 * GRID[0], 0.3 * GRID[2], 10 * GRID[-1]):
        found = one_threshold(curves, target)
        assert statistics.mean(point.error for point in found) == pytest.approx(target)
        assert found[1].error == pytest.approx(3 * found[0].error)


def test_rows_count_what_is_within() -> None:
    calls = [held_out(0.005, 0.1), held_out(0.015, 0.2), held_out(0.03, 0.3), held_out(0.01, 0.4)]
    row, same = rows(calls, [BUDGET])
    assert (row.median, row.worst, row.density) == pytest.approx((1.25, 3, 0.25))
    assert (row.worst_at, row.kept, row.within) == ("layer 0.03, text 1", 0.5, 0.75)
    assert (same.median, same.worst) == pytest.approx((1.5, 1.5))


def test_no_threshold_for_all_has_no_error() -> None:
    """Where a calibration leaves every site dense, there is no mean error to compare at."""
    (row,) = rows([held_out(0.0, 1.0)], [BUDGET])
    assert (row.rule, row.worst, row.density) == ("calibrated", 0, 1)


@pytest.mark.slow
def test_calls_of_texts() -> None:
    model, seen, unseen = tiny("llama"), {"input_ids": tokens(250, 1)}, {"input_ids": tokens(250, 1)}
    calibrations = calibrate_each(model, seen, [BUDGET])
    for (found,) in calibrations.values():  # so short a call saves nothing: the first layer stays dense
        first, second = found.sites
        found.sites[second] = dataclasses.replace(found.sites[second], dense="")
    calls = measure_texts(model, [seen, unseen], calibrations, [BUDGET])
    assert [(call.text, call.site) for call in calls] == [(1, first), (1, second), (2, first), (2, second)]
    assert calls[0].rules["calibrated"] == calls[2].rules["calibrated"] == [DENSE]
    for rule, (found,) in calibrations.items():
        site, (measured,) = found.sites[second], calls[1].rules[rule]
        assert dataclasses.astuple(measured) == pytest.approx((site.threshold, site.density, site.error), rel=1e-3)
    assert calls[1].rules["calibrated"][0].error < calls[1].rules["calibrated to the whole budget"][0].error <= BUDGET

    direct: list[float] = []

    def handle(call: SiteInputs) -> None:
        config = S2OConfig(error_budget=BUDGET, min_length=0)
        output = attention(call.query, call.key, call.value, is_causal=True, config=config)
        direct.append(float((output - call.dense).square().sum() / call.dense.square().sum()))

    visit_sites(model, unseen, S2OConfig(), handle, lambda decisions: None)
    assert [call.rules["budget alone"][0].error for call in calls[2:]] == pytest.approx(direct, rel=1e-3)
