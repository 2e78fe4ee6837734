"""The specification itself: exact at threshold 0, and sparse as it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given

from s2o_compile.ops import Ranking, S2OConfig
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.visibility import Visibility

from .comparison import dense, largest_difference, seen
from .strategies import Call, calls, configs


@given(calls(longest=150, settings=configs(thresholds=(0.0,))))
def test_threshold_zero_is_dense(call: Call) -> None:
    tensors, visibility, sinks = call.tensors(torch.float64), call.visibility(), call.sinks()
    result = reference_attention(*tensors, visibility, softcap=call.softcap, sinks=sinks, config=call.config)
    mask = seen(*tensors[:2], visibility)
    assert largest_difference(result.output, dense(*tensors, mask, softcap=call.softcap, sinks=sinks)) < 1e-12
    empty = ~mask.any(-1).expand(result.lse.shape)
    nothing = torch.full_like(result.lse, -torch.inf) if sinks is None else sinks[:, None].double().expand_as(empty)
    assert largest_difference(result.lse[empty].exp(), nothing[empty].exp()) < 1e-12
    assert result.lse[~empty].isfinite().all()


@pytest.mark.parametrize("size", ["batch", "queries", "keys"])
@given(call=calls(longest=40))
def test_nothing_to_attend_to_gives_zeros(size: str, call: Call) -> None:
    call = dataclasses.replace(call, **{size: 0})
    query, key, value = call.tensors(torch.float64)
    sinks = call.sinks()
    result = reference_attention(
        query, key, value, call.visibility(), softcap=call.softcap, sinks=sinks, config=call.config
    )
    tiles = -(-call.queries // call.config.ranking.tile)
    empty = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    assert torch.equal(result.output, torch.zeros(*query.shape[:3], call.value_channels, dtype=torch.float64))
    assert torch.equal(result.lse, empty if sinks is None else sinks.double()[:, None].expand_as(empty))
    assert torch.equal(result.visited, torch.zeros(*query.shape[:2], tiles, dtype=torch.int64))


def needle(length: int = 1024) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs in which every query from 256 on wants key 100, and nothing else stands out."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, length, 16, generator=generator, dtype=torch.float64) for _ in "qkv")
    query[:, :, 256:] = 0.1 * query[:, :, 256:] + 3
    key[:, :, 100] = 5
    return query, key, value


@pytest.mark.parametrize(
    "config",
    [
        S2OConfig(threshold=1e-2, ranking=Ranking(near_keys=0, rule="dropped")),
        S2OConfig(threshold=1e-2, ranking=Ranking(near_keys=0, pool=4, lists="head")),
        S2OConfig(threshold=1e-2, ranking=Ranking(near_keys=0, guides="kv_head", combine="mean")),
        S2OConfig.paper(threshold=1e-2).with_ranking(segment=32, pool=32),
    ],
    ids=["default", "pooled", "mean", "paper"],
)
def test_the_key_that_matters_is_visited_and_little_else(config: S2OConfig) -> None:
    query, key, value = needle()
    result = reference_attention(query, key, value, Visibility(True), config=config)
    want = dense(query, key, value, torch.ones(1024, 1024, dtype=torch.bool).tril())
    rows = slice(256, None)
    assert largest_difference(result.output[:, :, rows], want[:, :, rows]) < 1e-6
    everything = reference_attention(
        query, key, value, Visibility(True), config=dataclasses.replace(config, threshold=0.0)
    )
    late = slice(256 // config.ranking.tile, None)
    assert result.visited[..., late].sum() < 0.6 * everything.visited[..., late].sum()


def test_a_higher_threshold_visits_less_and_errs_more() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (2 * torch.randn(1, 2, 512, 16, generator=generator, dtype=torch.float64) for _ in "qkv")
    want = dense(query, key, value, torch.ones(512, 512, dtype=torch.bool).tril())
    visited, errors = [], []
    for threshold in (0.0, 1e-4, 1e-2, 1e-1):
        config = S2OConfig(threshold=threshold, ranking=Ranking(rule="dropped", near_keys=0))
        result = reference_attention(query, key, value, Visibility(True), config=config)
        visited.append(int(result.visited.sum()))
        errors.append(float((result.output - want).square().sum()))
    assert visited == sorted(visited, reverse=True) and visited[0] > visited[-1]
    assert errors == sorted(errors) and errors[0] < 1e-20


def test_block_means_stand_for_skipped_keys() -> None:
    """With keys alike inside each block, a block's mean loses nothing, however few keys are listed."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(1, 1, 512, 16, generator=generator, dtype=torch.float64)
    key, value = (
        torch.randn(1, 1, 8, 16, generator=generator, dtype=torch.float64).repeat_interleave(64, 2) for _ in "kv"
    )
    config = S2OConfig(threshold=0.5, ranking=Ranking(rule="means", near_keys=0))
    result = reference_attention(query, key, value, Visibility(True), config=config)
    want = dense(query, key, value, torch.ones(512, 512, dtype=torch.bool).tril())
    assert largest_difference(result.output, want) < 1e-12
