"""What all implementations share: as the specification has it, which repeats it, or as is spelled out here."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import AttentionResult, Ranking, S2OConfig, reference, reference_variants
from s2o_compile.ops.density import dense_pairs, share_in_all_channels
from s2o_compile.ops.geometry import Geometry
from s2o_compile.ops.reference_variants import reference_attention
from s2o_compile.ops.rule.block_means import block_means
from s2o_compile.ops.rule.channels import project
from s2o_compile.ops.rule.guides import pool_guides
from s2o_compile.ops.rule.output_weighting import sampled_rows, value_distances
from s2o_compile.ops.rule.sampling import draws, most_logits
from s2o_compile.ops.rule.sinks import add_sinks
from s2o_compile.ops.rule.softmax import soft_cap
from s2o_compile.ops.visibility import Visibility

from .comparison import largest_difference
from .strategies import Call, calls, configs


def visible(terms: Visibility, batch: int, head: int, row: int, key: int) -> bool:
    """Whether a query sees a key, one term after another."""
    place = row + terms.causal_offset
    if terms.is_causal and key > place:
        return False
    if terms.window is not None and place - key >= terms.window:
        return False
    if terms.key_padding is not None and not terms.key_padding[batch, key]:
        return False
    of_row, of_key = terms.query_documents, terms.key_documents
    if of_row is not None and of_key is not None and of_row[batch, row] != of_key[batch, key]:
        return False
    if terms.mask is None:
        return True
    index = zip((batch, head, row, key), terms.mask.shape, strict=True)
    return bool(terms.mask[tuple(min(place, size - 1) for place, size in index)])


@settings(max_examples=40)
@given(calls(longest=24))
def test_visibility_is_every_term_of_each_pair(call: Call) -> None:
    """By indices of any shape, as one mask, and without terms that hide nothing."""
    terms, shape = call.visibility(), (call.batch, call.heads, call.queries, call.keys)
    want = torch.tensor([visible(terms, *place) for place in np.ndindex(shape)]).view(shape)
    batch, head, row, key = (torch.arange(size) for size in shape)
    simplified = terms.simplified(call.queries, call.keys)
    for same in (terms, simplified):
        seen = same.seen(batch[:, None, None, None], head[:, None, None], row[:, None], key)
        assert torch.equal(seen.expand(shape), want)
        assert torch.equal(same.as_mask(call.batch, call.queries, call.keys, key.device).expand(shape), want)
    place = tuple(torch.randint(size, (50,)) for size in shape)
    assert torch.equal(terms.seen(*place).expand(50), want[place])


@given(calls(longest=10))
def test_settings_are_followed_as_far_as_queries_see_the_same(call: Call) -> None:
    """What queries see differently has no mean for them all."""
    terms, config = call.visibility(), call.config
    want = config
    if call.documents or call.mask is not None:
        want = want.with_ranking(pool=1, guides="head")
    if call.documents or call.mask is not None or call.window is not None:
        if config.ranking.rule == "means":
            want = want.with_ranking(rule="sampled")
        if want.ranking.merges:
            want = want.with_ranking(radius=0.0)
    assert terms.effective_config(config) == want


@given(calls(longest=400))
def test_spans_and_histories(call: Call) -> None:
    """Spans are where the documentation says; history, dense span and what nobody sees are all keys, each once."""
    terms, config = call.visibility(), call.config
    geometry = Geometry.of(torch.empty(1, 1, call.queries, 8), torch.empty(1, 1, call.keys, 8), terms, config)
    sizes = (config.ranking.segment, config.ranking.near_keys, call.queries, call.keys)
    span = partial(reference_variants.span_of_last_queries, last_queries=config.last_queries)
    span = span if config.last_queries else reference.span
    want = [span(i, *sizes, terms) for i in range(geometry.segments)]
    assert [tuple(geometry.span(i)) for i in range(geometry.segments)] == want
    positions = torch.arange(call.keys)
    histories = geometry.history(positions, torch.tensor(want).view(-1, 3))
    for i, (start, low, high) in enumerate(want):
        history = [k for k in range(call.keys) if start <= k < low or (k >= high and not call.is_causal)]
        assert histories[i].nonzero().flatten().tolist() == history
        assert len(history) <= geometry.longest_history(i)
        if i >= geometry.ranked_segments:
            assert not history
        if call.window is None:
            blocks = {k // 64 for k in history}
            assert geometry.history_blocks(low, high) >= len(blocks)


@given(st.integers(1, 300), st.integers(1, 300), st.booleans(), st.integers(-100, 300), st.sampled_from([16, 32, 128]))
def test_dense_pairs_are_those_of_blocks_that_a_tile_sees(
    queries: int, keys: int, is_causal: bool, offset: int, tile: int
) -> None:
    pairs = 0
    for first in range(0, queries, tile):
        rows = range(first, min(first + tile, queries))
        seen = [k for k in range(keys) if not is_causal or any(k <= row + offset for row in rows)]
        pairs += len(rows) * 64 * len({k // 64 for k in seen})
    assert dense_pairs(queries, keys, is_causal, offset, tile) == pairs


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20),
    st.lists(st.integers(0, 2**27), min_size=1, max_size=5),
)
def test_draws_are_a_weyl_sequence(keys: list[int], segments: list[int]) -> None:
    golden, silver = (5**0.5 - 1) / 2, 2**0.5 - 1
    steps = round(golden * 2**32), math.floor(silver * 2**32)
    want = [[((k * steps[0] + s * steps[1]) % 2**32 // 2**9 + 0.5) / 2**23 for k in keys] for s in segments]
    drawn = draws(torch.tensor(keys), torch.tensor(segments)[:, None]).double()
    assert torch.equal(drawn, torch.tensor(want, dtype=torch.float64))
    assert torch.equal(drawn, torch.stack([reference.draws(torch.tensor(keys), s) for s in segments]))


def test_draws_are_uniform_and_neighbours_differ() -> None:
    """As many in each tenth; neighbours, along keys and along segments, are both small less often than by chance."""
    drawn = draws(torch.arange(2000), torch.arange(500)[:, None])
    assert (torch.histc(drawn, 10, 0, 1) / drawn.numel() - 0.1).abs().max() < 1e-3
    for pair in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        both = ((pair[0] < 0.3) & (pair[1] < 0.3)).double().mean()
        assert both < 0.09


@pytest.mark.parametrize("lists", ["kv_head", "head"])
@pytest.mark.parametrize(("measure", "threshold"), [("mass", 0.05), ("output", 0.4)])
def test_the_sampled_tail_is_unbiased(lists: str, measure: str, threshold: float) -> None:
    """Over orders of the keys, which get other draws, softmax sums are dense attention's in the mean."""
    generator = torch.Generator().manual_seed(11)
    query, key, value = (
        torch.randn(1, heads, length, 16, generator=generator, dtype=torch.float64)
        for heads, length in ((2, 32), (1, 640), (1, 640))
    )
    orders = 200
    config = S2OConfig(
        threshold=threshold, ranking=Ranking(lists=lists, measure=measure, sample=1, near_keys=0, channels=None)
    )
    logits = query @ key.mT / 4
    total = logits.logsumexp(-1)
    want = logits.softmax(-1) @ value
    masses, sums, visited = [], [], []
    for _ in range(orders):
        order = torch.randperm(640, generator=generator)
        got = reference_attention(query, key[:, :, order], value[:, :, order], config=config)
        share = (got.lse - total).exp()
        masses.append(share)
        sums.append(got.output * share[..., None])
        visited.append(got.visited.double().mean())
    assert torch.stack(visited).mean() < 0.7 * 32 * 640
    mass, weighted = torch.stack(masses), torch.stack(sums)
    # Mean and standard error of each row; 5 of them bound some 1,000 numbers.
    for got, true in ((mass, torch.ones_like(total)), (weighted, want)):
        assert ((got.mean(0) - true).abs() <= 5 * got.std(0) / orders**0.5 + 1e-9).all()
        assert got.std(0).max() > 0
    assert mass.var(0).mean() < threshold


@given(st.integers(0, 2**31), st.integers(0, 30), st.sampled_from([0.0, 1.5, 20.0]), st.booleans())
def test_sinks_and_soft_caps_are_those_of_one_softmax(seed: int, keys: int, softcap: float, far: bool) -> None:
    """Also where no key is seen, and where logits are far apart."""
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((1, 3, 2, 4), (1, 1, keys, 4), (1, 1, keys, 5))
    )
    query = query * (300 if far else 1)
    mask = torch.rand(1, 3, 2, keys, generator=generator) < 0.6
    logits = soft_cap(query @ key.mT, softcap)
    assert not softcap or largest_difference(logits, softcap * torch.tanh(query @ key.mT / softcap)) < 1e-12
    logits = logits.masked_fill(~mask, -math.inf)
    lse = logits.logsumexp(-1)
    result = AttentionResult(logits.softmax(-1).nan_to_num(0) @ value, lse, torch.zeros(1, 3, 1).long())
    sinks = torch.tensor([0.5, -math.inf, 2.0]).double()
    sunk = add_sinks(result, sinks)
    whole = torch.cat([sinks.expand(2, 3).T[None, ..., None], logits], -1)
    assert largest_difference(sunk.output, whole.softmax(-1).nan_to_num(0)[..., 1:] @ value) < 1e-12
    want = whole.logsumexp(-1)
    assert torch.equal(sunk.lse == -math.inf, want == -math.inf)
    assert largest_difference(sunk.lse.exp(), want.exp()) <= 1e-12 * float(want.exp().max()) or far
    terms = Visibility(mask=mask)
    settings = {"scale": 1.0, "softcap": softcap, "sinks": sinks, "config": S2OConfig(threshold=0)}
    specified = reference_attention(query, key, value, terms, **settings)
    assert largest_difference(specified.output, sunk.output) < 1e-12
    assert torch.equal(specified.lse == -math.inf, want == -math.inf)


@pytest.mark.parametrize("softcap", [1e-46, 1e-40, 1e-37])
def test_logits_of_zero_stay_zero_under_the_smallest_caps(softcap: float) -> None:
    """Which are 0 in float32, or lose digits there."""
    logits = torch.tensor([0.0, 1.0, -1e30])
    assert largest_difference(soft_cap(logits, softcap), torch.zeros(3)) <= 2 * softcap


@given(st.integers(1, 200), st.booleans(), st.integers(0, 2**31))
def test_block_means(keys: int, padded: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, keys, 5, generator=generator, dtype=torch.float64)
    valid = torch.rand(2, 1, keys, generator=generator) < 0.4 if padded else torch.ones(2, 1, keys).bool()
    hidden = torch.where(valid[..., None], x, torch.nan)
    got = block_means(hidden, valid if padded else None)
    for b, h, block in np.ndindex(2, 3, math.ceil(keys / 64)):
        rows = [x[b, h, k] for k in range(block * 64, min(block * 64 + 64, keys)) if valid[b, 0, k]]
        want = torch.stack(rows).mean(0) if rows else torch.zeros(5).double()
        assert largest_difference(got[b, h, block], want) < 1e-12


@given(configs(), st.integers(1, 70), st.integers(1, 3))
def test_guides_are_means(config: S2OConfig, length: int, heads: int) -> None:
    query, seen = torch.randn(2, 1, heads, length, 8, dtype=torch.float64), torch.rand(2, 1, heads, length, 5) < 0.5
    want, sees = reference_variants.mean_guides(query, seen, config.ranking.pool, config.ranking.guides == "kv_head")
    assert largest_difference(pool_guides(query, config), want) < 1e-12
    starts = range(0, length, config.ranking.pool)
    spelled = torch.stack([query[..., i : i + config.ranking.pool, :].mean(-2) for i in starts], -2)
    spelled = spelled.mean(2, keepdim=True) if config.ranking.guides == "kv_head" else spelled
    assert largest_difference(want, spelled) < 1e-12
    assert torch.equal(sees, seen[:, :, : sees.shape[2], list(starts)])


@settings(max_examples=40)
@given(calls(longest=220), st.sampled_from([1, 3, 8, 12, 20, 40, 100]), st.sampled_from([0.1, 0.5, 1.0]))
def test_scores_are_those_of_the_specification(call: Call, count: int, scale: float) -> None:
    """Their products, and how much they lack; where that is too much the specification scores all channels."""
    query, key, value = call.tensors(torch.float64)
    terms = call.visibility()._replace(mask=None, window=None)
    specified = reference.call_of(query, key, value, terms, scale)
    guides = pool_guides(specified.query, call.config)
    valid = terms.key_padding
    got = project(guides, specified.key[:, :, 0], count, scale, None if valid is None else valid[:, None])
    projection = reference_variants.subspace if 2 * count < call.channels else reference.projection
    chosen, nu = reference.channels(specified, guides, min(count, call.channels), projection)
    lacks = got.neglects_too_much[:, :, None, None]
    neglected = torch.zeros(lacks.shape) if got.neglected is None else got.neglected[:, :, None, None]
    assert largest_difference(nu, neglected.masked_fill(lacks, 0)) < 1e-9
    products = torch.where(lacks[..., None], guides @ specified.key.mT, got.guides @ got.key[:, :, None].mT)
    allowed = 1e-6 * max(1.0, float(products.abs().max()))
    assert largest_difference(guides @ chosen @ specified.key.mT, products) < allowed


@settings(max_examples=40)
@given(calls(longest=120))
def test_distances_of_values_are_those_of_the_specification(call: Call) -> None:
    query, key, value = call.tensors(torch.float64)
    terms = call.visibility()
    specified = reference.call_of(query, key, value, terms, 0.5, call.softcap)
    rows = sampled_rows(call.queries, call.group, key.device)
    got = value_distances(
        specified.query[..., rows, :],
        specified.key[:, :, 0],
        specified.value[:, :, 0],
        specified.seen[..., rows, :],
        0.5,
        call.softcap,
    )
    assert largest_difference(got, reference_variants.value_distances(specified)[:, :, 0, 0]) < 1e-9


@given(st.lists(st.floats(-50, 50) | st.sampled_from([math.inf, -math.inf, math.nan])), st.floats(1e-6, 0.9))
def test_sampled_keys_add_at_most_four_thresholds(lse: list[float], threshold: float) -> None:
    for most, own in zip(most_logits(torch.tensor(lse, dtype=torch.float64), threshold).tolist(), lse, strict=True):
        if math.isfinite(own):
            assert math.isclose(math.exp(most), 4 * threshold * math.exp(own), rel_tol=1e-9)
        else:
            assert most == (own if own == -math.inf else math.inf)


def test_the_share_of_groups_in_all_channels_is_counted() -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(3, 4, 50, 16, generator=generator) * torch.tensor([0.3, 3.0, 0.2, 0.1])[:, None, None]
    key = torch.randn(3, 4, 60, 16, generator=generator)
    call = reference.call_of(query, key, key, Visibility(), scale=1.0)
    lacks = (reference.channels(call, call.query, 8, reference.projection)[1] == 0).double().mean()
    assert 0 < lacks < 1
    assert share_in_all_channels(query, key, 1.0, S2OConfig(ranking=Ranking(channels=8))) == lacks
