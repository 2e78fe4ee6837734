"""What importance measures beside mass, and what keeps misjudged keys from doing harm."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from s2o_compile.ops.rule import sampling
from s2o_compile.ops.rule.output_weighting import sampled_rows, value_distances

from .settings import config_of


def test_distances_are_in_units_of_the_outputs() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 5, 8), torch.randn(40, 8), torch.randn(40, 6)
    seen = torch.arange(40) < torch.tensor([10, 20, 30, 40, 0])[:, None]
    output = torch.stack([(head @ key.T * 0.5).masked_fill(~seen, -math.inf).softmax(-1) @ value for head in query])
    mean = output[:, :4].square().sum(-1).mean()
    want = (1 + value.square().sum(-1) / mean).sqrt()
    torch.testing.assert_close(value_distances(query, key, value, seen, 0.5, 0.0), want)
    query = torch.cat([query, torch.full((3, 1, 8), torch.nan)], 1)
    seen = torch.cat([seen, torch.ones(1, 40, dtype=torch.bool)])
    torch.testing.assert_close(value_distances(query, key, value, seen, 0.5, 0.0), want)
    assert torch.equal(value_distances(query, key, torch.zeros(40, 6), seen, 0.5, 0.0), torch.ones(40))


@pytest.mark.parametrize(("queries", "heads"), [(1, 1), (7, 3), (5000, 4), (100, 200)])
def test_sampled_rows_are_spread_over_all(queries: int, heads: int) -> None:
    rows = sampled_rows(queries, heads, torch.device("cpu"))
    assert len(rows) == max(1, 64 // heads)
    assert rows.min() >= 0 and rows.max() < queries
    assert (rows.diff() >= 0).all()


def error(**fields: Any) -> tuple[float, float]:
    """The relative squared error on random inputs, and the pairs visited."""
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, heads, 1500, 64) * size for heads, size in ((2, 2), (1, 1), (1, 1)))
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    got = torch.ops.s2o.attention_stats(
        query, key, value, is_causal=True, **config_of(min_length=0, **fields).arguments()
    )
    return float((got[0] - want).square().sum() / want.square().sum()), float(got[2].sum())


@pytest.mark.parametrize("channels", [56, 48, 40])
def test_fewer_channels_cost_density_and_not_error(channels: int) -> None:
    """On inputs that spread over all directions, where they miss most."""
    (all_error, all_pairs), (few_error, few_pairs) = (error(threshold=0.02, channels=x) for x in (None, channels))
    assert few_error <= 1.2 * all_error and few_pairs > all_pairs


def test_what_importance_measures_changes_with_values() -> None:
    """Outputs of random values are small beside them, so that more of them matter."""
    (mass_error, mass_pairs), (output_error, output_pairs) = (
        error(threshold=0.02, measure=x) for x in ("mass", "output")
    )
    assert output_error < 0.5 * mass_error and output_pairs > mass_pairs


def test_keys_that_mean_queries_misjudge_weigh_no_more_than_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"threshold": 0.02, "pool": 8}
    bounded, _ = error(**fields)
    monkeypatch.setattr(sampling, "MAX_WEIGHT_FACTOR", math.inf)
    unbounded, _ = error(**fields)
    assert bounded < 0.8 * unbounded
