"""Queries merged: how far from its own a guide may be, in all three implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import AttentionResult, Ranking, S2OConfig, cpu, reference
from s2o_compile.ops.density import share_of_guides
from s2o_compile.ops.kernels import merge, pipeline, quantise, tiling
from s2o_compile.ops.kernels.arguments import Arguments
from s2o_compile.ops.kernels.channels import key_covariance, sample_moments
from s2o_compile.ops.kernels.helpers import FLOAT8_REACH
from s2o_compile.ops.kernels.plan import plan_of
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.rule import channels
from s2o_compile.ops.rule.merging import find_clusters
from s2o_compile.ops.visibility import Visibility

from ..examples import examples
from .comparison import COARSEST, dense, largest_difference, seen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 90), st.integers(2, 200))
RADII = st.sampled_from([0.1, 1.0, 2.5, 100.0])


def inputs(sizes: tuple[int, ...], width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [B, H, G, L, D], some of them alike, and keys [B, H, N, D] that vary more along some channels."""
    batch, kv_heads, group, length, keys = sizes
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads, group, length, width, generator=generator, dtype=torch.float64)
    alike = torch.randint(max(1, length // 4), (length,), generator=generator)
    query = query[..., alike, :] + 0.1 * query
    spread = torch.logspace(0.5, -1, width, dtype=torch.float64)
    return query, torch.randn(batch, kv_heads, keys, width, generator=generator, dtype=torch.float64) * spread + 1


def specified(query: torch.Tensor, key: torch.Tensor, radius: float, scale: float) -> reference.Guides:
    """What the reference makes of the first 64 queries."""
    call = reference.call_of(query.flatten(1, 2), key, key, Visibility(), scale)
    return reference.merge(
        call, call.query[..., :64, :], call.seen[..., :64, :], reference.key_covariance(call), radius
    )


@settings(max_examples=examples(30))
@given(SIZES, RADII, st.integers(0, 2**31))
def test_no_query_is_far_from_its_guide(sizes: tuple[int, ...], radius: float, seed: int) -> None:
    """Distances spelled out, as the standard deviation over keys of how much the logits of two queries differ."""
    query, key = inputs(sizes, 16, seed)
    guides = specified(query, key, radius, 0.5)
    query = query[..., :64, :]
    own = guides.query.take_along_dim(guides.owner[..., None], -2)
    apart = (0.5 * (query - own) @ key[:, :, None].mT).std(-1, correction=0)
    assert (apart <= guides.reach.gather(-1, guides.owner) + 1e-9).all()
    assert (apart <= 2 * radius + 1e-9).all()
    is_guide = guides.seen.any(-1)
    reached = torch.zeros_like(guides.reach).scatter_reduce_(-1, guides.owner, apart, "amax")
    assert largest_difference(torch.where(is_guide, guides.reach, 0), reached) < 1e-6
    for guide in range(is_guide.shape[-1]):
        members = guides.owner == guide
        assert torch.equal(members.any(-1), is_guide[..., guide])
        mean = (query * members[..., None]).sum(-2) / members.sum(-1, keepdim=True).clamp_min(1)
        assert (
            largest_difference(torch.where(is_guide[..., guide, None], mean - guides.query[..., guide, :], 0), 0 * mean)
            < 1e-9
        )


@settings(max_examples=examples(30))
@given(SIZES, RADII, st.integers(0, 2**31))
def test_clusters_are_those_of_the_specification(sizes: tuple[int, ...], radius: float, seed: int) -> None:
    """Whatever their order, which rounding may decide."""
    query, key = inputs(sizes, 16, seed)
    query = query[..., :64, :]
    guides = specified(query, key, radius, 0.5)
    runs = torch.nn.functional.pad(query, (0, 0, 0, -query.shape[3] % 32)).unflatten(3, (-1, 32))
    real = torch.arange(runs.shape[3] * 32).view(-1, 32) < query.shape[3]
    covariance = channels.key_covariance(key, None)[:, :, None, None]
    clusters = find_clusters(runs * 0.5, real, covariance, radius)
    assert torch.equal(clusters.number.sum(-1), guides.seen.any(-1).sum(-1))
    means = clusters.means(runs, real).take_along_dim(clusters.owner[..., None], -2)
    assert same(means.flatten(3, 4)[..., : query.shape[3], :], guides.query, guides, 1e-9)
    reach = clusters.reach.gather(-1, clusters.owner)
    assert same(reach.flatten(3)[..., : query.shape[3], None], guides.reach[..., None], guides, 1e-6)


def same(of_queries: torch.Tensor, of_guides: torch.Tensor, guides: reference.Guides, tolerance: float) -> bool:
    """Whether queries have what belongs to their guides."""
    return largest_difference(of_queries, of_guides.take_along_dim(guides.owner[..., None], -2)) < tolerance


@pytest.mark.hypothesis
@settings(max_examples=examples(10))
@given(
    SIZES,
    RADII,
    st.sampled_from([(16, "kv_head"), (32, "kv_head"), (64, "kv_head"), (32, "head")]),
    st.sampled_from([16, 40, 128]),
    st.integers(0, 2**31),
)
def test_the_kernels_merge_as_specified(
    sizes: tuple[int, ...], radius: float, rule: tuple[int, str], width: int, seed: int
) -> None:
    segment, lists = rule
    query, key = (x.float().to(DEVICE) for x in inputs(sizes, width, seed))
    group, length = sizes[2:4]
    config = S2OConfig(ranking=Ranking(radius=radius, merge_length=0, segment=segment, lists=lists))
    arguments = Arguments(query.flatten(1, 2), key, key, Visibility(), None, 0.5, 0.0, config, query.device)
    got = merge.merge(arguments, key_covariance(sample_moments(query, key, None), key, None, 0.5))
    call = reference.call_of(query.flatten(1, 2), key, key, Visibility(), 0.5)
    most, per_list = arguments.guides_of_segment, group // arguments.lists
    for first in range(0, length, segment):
        rows, places = slice(first, first + segment), slice(first // segment * most, (first // segment + 1) * most)
        x, seen = call.query[..., rows, :], call.seen[..., rows, :]
        guides = reference.merge(call, x, seen, reference.key_covariance(call), radius)
        of_lists = guides.seen.any(-1).sum(-1).unflatten(2, (-1, per_list)).sum(-1)
        assert torch.equal(got.counts[..., first // segment], of_lists.int())
        owner = got.owner[..., rows].long()
        for found, wanted in ((got.rows, guides.query), (got.reach[..., None] * math.log(2), guides.reach[..., None])):
            of_queries = found[:, :, :, places].repeat_interleave(per_list, 2).take_along_dim(owner[..., None], -2)
            assert same(of_queries, wanted, guides, 1e-3)
        earliest = got.first[:, :, :, places].repeat_interleave(per_list, 2).gather(-1, owner)
        alike = guides.owner[..., :, None] == guides.owner[..., None, :]
        assert torch.equal(earliest, (first + alike.int().argmax(-1)).int())


@pytest.mark.hypothesis
@settings(max_examples=examples(8))
@given(SIZES, st.sampled_from([1.0, 2.5]), st.sampled_from([(40, 33), (128, 64), (32, None)]), st.integers(0, 2**31))
def test_queries_merged_in_float8_are_the_same_but_for_rounding(
    sizes: tuple[int, ...], radius: float, width_and_picked: tuple[int, int | None], seed: int
) -> None:
    width, few = width_and_picked
    query, key = (x.half().to(DEVICE) for x in inputs(sizes, width, seed))
    batch, kv_heads = sizes[:2]
    config = S2OConfig(ranking=Ranking(radius=radius, merge_length=0))
    arguments = Arguments(query.flatten(1, 2), key, key, Visibility(), None, 0.5, 0.0, config, query.device)
    covariance = key_covariance(sample_moments(query, key, None), key, None, 0.5)
    order = [torch.randperm(width)[:few].sort().values for _ in range(batch * kv_heads)]
    channels = None if few is None else torch.stack(order).view(batch, kv_heads, few).int().to(DEVICE)
    want, units = merge.merge(arguments, covariance), quantise.Units.of(key)
    got = merge.merge(arguments, covariance, units, channels)
    for name in ("counts", "owner"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    most = arguments.guides_of_segment
    is_guide = (torch.arange(most, device=DEVICE) < want.counts[..., None]).flatten(-2)[..., None]
    reach = units.ranges[0, :, :, None, None, None]
    assert (query.abs().amax((2, 3, 4)) <= units.ranges[0]).all()
    restored, smallest = got.rows.float() * reach / FLOAT8_REACH.value, 2**-9 / FLOAT8_REACH.value * reach
    error = (restored - want.rows.float()).abs()
    assert (~is_guide | (error <= COARSEST * want.rows.float().abs() + smallest)).all()
    keys, both = (
        quantise.quantise_keys(key, units, channels),
        quantise.quantise(got.rows[:, :, :, :1].half(), key, channels),
    )
    assert all(torch.equal(x.float(), y.key.float()) for x, y in zip(keys, both, strict=True))
    if channels is None:
        assert got.subset is got.rows
    else:
        of_subset = got.rows.float().take_along_dim(channels.long()[:, :, None, None], -1)
        assert (~is_guide | (got.subset.float() == of_subset)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_query_leaves_no_guides_without_members(bad: float) -> None:
    """Distances that are NaN count as 0, as in the specification."""
    query, key = (x.float().to(DEVICE) for x in inputs((1, 1, 2, 70, 90), 32, 0))
    query[0, 0, 1, 40, 3] = bad
    config = S2OConfig(ranking=Ranking(radius=1.0, merge_length=0))
    arguments = Arguments(query.flatten(1, 2), key, key, Visibility(), None, 0.5, 0.0, config, query.device)
    covariance = key_covariance(sample_moments(query, key, None), key, None, 0.5)
    counts = merge.merge(arguments, covariance).counts[0, 0, 0]
    real, size = torch.ones(32, dtype=torch.bool, device=DEVICE), query.shape[-1]
    of_runs = [find_clusters(query[0, 0, :, n : n + 32], real, covariance[0, 0, :size, :size], 1.0) for n in (0, 32)]
    assert counts[:2].tolist() == [of_run.number.sum().item() for of_run in of_runs]


@pytest.mark.parametrize(("picked", "half"), [(None, False), (40, False), (40, True)])
def test_merged_queries_rank_in_float8_as_in_half_precision(
    picked: int | None, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole call in the interpreter too, which says of no CPU that it has float8; of keys with a mean of 0.

    Where products are summed in half precision, digits of log-sum-exps are among the channels that are picked.
    """
    torch.manual_seed(7)
    query, key = (x.half().flatten(1, -3).to(DEVICE) for x in inputs((1, 2, 2, 300, 300), 64, 7))
    key, value = key - key.mean(2, keepdim=True), torch.randn_like(key)
    config = S2OConfig(threshold=0.02, ranking=Ranking(merge_length=0, radius=1.0, channels=picked))

    def attended(in_float8: bool) -> AttentionResult:
        monkeypatch.setattr(quantise, "ranks_in_float8", lambda *_: in_float8)
        monkeypatch.setattr(quantise, "adds_in_half", lambda device: half)
        plan_of.cache_clear()
        return pipeline.sparse_attention(query, key, value, Visibility(True), 0.125, 0.0, config)

    (want, _, of_want), (got, _, of_got) = attended(False), attended(True)
    plan_of.cache_clear()
    exact = dense(query, key, value, seen(query, key, Visibility(True)), 0.125)
    errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (want, got)]
    assert 0 < errors[0] < 0.1
    assert errors[1] < 1.2 * errors[0]
    assert 0.9 < of_got.sum() / of_want.sum() < 1.1
    assert of_want.sum() < 0.9 * of_want.numel() * 32 * 300


@pytest.mark.parametrize("queries", [560, 700])
def test_segments_scored_together_change_nothing(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their guides have parts of a product to themselves, whichever segments those with as many guides are."""
    generator = torch.Generator().manual_seed(queries)
    query, key, value = (torch.randn(1, heads, 700, 32, generator=generator).to(DEVICE) for heads in (2, 1, 1))
    query = query[:, :, :queries] * 3 * torch.rand(queries // 10, 1, generator=generator).to(DEVICE).repeat(10, 1)
    terms = Visibility(True, 700 - queries)
    config = S2OConfig(threshold=0.05, ranking=Ranking(merge_length=0, segment=16, channels=None))

    def attended(among: int) -> AttentionResult:
        monkeypatch.setattr(tiling, "AMONG", among)
        plan_of.cache_clear()
        return pipeline.sparse_attention(query, key, value, terms, 0.3, 0.0, config)

    together, consecutive = attended(32), attended(1)
    plan_of.cache_clear()
    assert all(torch.equal(one, other) for one, other in zip(together, consecutive, strict=True))
    assert 0.1 < share_of_guides(query, key, 0.3, config) < 0.9


@pytest.mark.parametrize("implementation", [cpu, pipeline], ids=["cpu", "kernels"])
def test_a_key_that_a_single_query_wants_is_visited(implementation: Any) -> None:
    """Among queries that want other keys: it is not merged with these, or reaches far, whereas means lose the key."""
    torch.manual_seed(3)
    length, wanted = 400, 77
    query, key, value = (torch.randn(1, 1, length, 32, device=DEVICE) for _ in "qkv")
    query = query[:, :, :1] + 0.05 * query
    query[:, :, -40] = 6 * key[:, :, wanted]
    value[:, :, wanted] += 50
    config = S2OConfig(
        min_length=0, threshold=0.05, ranking=Ranking(merge_length=0, near_keys=0, rule="dropped", channels=None)
    )
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    for changes, is_found in (
        ({"radius": 1.0}, True),
        ({"radius": 2.0}, True),
        ({"radius": 1e4}, True),
        ({"pool": 32}, False),
    ):
        settings = config.with_ranking(**changes)
        output = implementation.sparse_attention(query, key, value, Visibility(True), 32**-0.5, 0.0, settings).output
        assert (largest_difference(output[:, :, -40], dense[:, :, -40]) < 1) == is_found


@pytest.mark.parametrize("lists", ["kv_head", "head"])
def test_segments_end_in_runs_without_queries(lists: str) -> None:
    """Of 96 unlike queries none are merged, so that no guide is left for the last quarter of a segment of 128."""
    torch.manual_seed(5)
    query, key, value = 10 * torch.randn(1, 2, 96, 64), torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64)
    config = S2OConfig(ranking=Ranking(merge_length=0, segment=128, channels=16, near_keys=0, lists=lists))
    got = cpu.sparse_attention(query, key, value, Visibility(), 0.125, 0.0, config).output
    want = reference_attention(query.double(), key.double(), value.double(), config=config).output
    assert config.bounds_weights(64)
    assert (got - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize(
    "terms",
    [
        Visibility(True, window=100),
        Visibility(True, query_documents=torch.zeros(1, 8), key_documents=torch.zeros(1, 8)),
        Visibility(True, mask=torch.ones(1, 1, 8, 8, dtype=torch.bool)),
    ],
    ids=["window", "documents", "mask"],
)
def test_queries_that_see_different_keys_are_not_merged(terms: Visibility) -> None:
    config = S2OConfig(ranking=Ranking(merge_length=8))
    assert not terms.effective_config(config, 8).ranking.merges
    assert Visibility(True).effective_config(config, 8).ranking.merges
    assert not Visibility(True).effective_config(config, 7).ranking.merges


@pytest.mark.parametrize("fields", [{"pool": 2}, {"guides": "kv_head"}, {"combine": "mean"}, {"radius": 0.0}])
def test_means_are_not_merged(fields: dict[str, object]) -> None:
    assert not Ranking(**fields).merges  # type: ignore[arg-type]


@pytest.mark.parametrize("radius", [-1.0, math.inf, math.nan, 1e20])
def test_a_radius_is_bounded(radius: float) -> None:
    with pytest.raises(ValueError, match="radius must be a number from 0 to 1,000,000, not"):
        Ranking(radius=radius)


@pytest.mark.parametrize(("scale", "left"), [(1e-3, 3 / 70), (1e3, 1.0)])
def test_the_share_of_guides_is_counted(scale: float, left: float) -> None:
    """Where all queries of a run are alike, a guide for each of three runs; where none are, all queries."""
    query, key = torch.randn(2, 4, 70, 16), torch.randn(2, 2, 90, 16)
    assert share_of_guides(query, key, scale, S2OConfig(ranking=Ranking(merge_length=90))) == pytest.approx(left)
    for ranking in (Ranking(radius=0.0, merge_length=90), Ranking(merge_length=91)):
        assert share_of_guides(query, key, scale, S2OConfig(ranking=ranking)) == 1
