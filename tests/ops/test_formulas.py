"""The specification, and what the implementations share with it, against formulas that are written independently."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2o_compile.ops import AttentionResult, S2OConfig
from s2o_compile.ops.density import dense_pairs, share_in_all_channels
from s2o_compile.ops.geometry import Geometry
from s2o_compile.ops.reference import reference_attention
from s2o_compile.ops.rule.block_means import block_means
from s2o_compile.ops.rule.guides import pool_guides
from s2o_compile.ops.rule.sampling import draws
from s2o_compile.ops.rule.sinks import add_sinks
from s2o_compile.ops.rule.softmax import OnlineSoftmax

from . import formulas
from .comparison import assert_same, largest_difference
from .comparison import seen as all_seen
from .strategies import Call, calls, configs


@settings(max_examples=40)
@given(calls(longest=220))
def test_the_specification_is_what_the_documentation_says(call: Call) -> None:
    tensors, terms = call.tensors(torch.float64), call.visibility()
    got = reference_attention(*tensors, terms, softcap=call.softcap, config=call.config)
    query, key, value = (x.numpy() for x in tensors)
    shape = (call.batch, call.heads, call.queries, call.keys)
    seen = all_seen(*tensors[:2], terms).expand(shape).numpy()
    valid = np.ones(shape[::3], dtype=bool) if terms.key_padding is None else terms.key_padding.numpy()
    want = [torch.empty_like(x) for x in got]
    for batch in range(call.batch):
        for group in range(call.groups):
            members = slice(group * call.group, (group + 1) * call.group)
            rows = formulas.attend_group(
                query[batch, members], key[batch, group], value[batch, group], seen[batch, members], terms,
                valid[batch], call.channels**-0.5, call.softcap, formulas.followed(call.config, terms),
            )  # fmt: skip
            for x, y in zip(want, (rows.output, rows.lse, rows.visited), strict=True):
                x[batch, members] = torch.from_numpy(y)
    assert_same(got, AttentionResult(*want), 1e-8)


@settings(max_examples=40)
@given(calls(longest=24))
def test_visibility_is_every_term_of_each_pair(call: Call) -> None:
    """By indices of any shape, as one mask, and without terms that hide nothing."""
    terms, shape = call.visibility(), (call.batch, call.heads, call.queries, call.keys)
    want = torch.tensor([formulas.visible(terms, *place) for place in np.ndindex(shape)]).view(shape)
    batch, head, row, key = (torch.arange(size) for size in shape)
    simplified = terms.simplified(call.queries, call.keys)
    for same in (terms, simplified):
        seen = same.seen(batch[:, None, None, None], head[:, None, None], row[:, None], key)
        assert torch.equal(seen.expand(shape), want)
        assert torch.equal(same.as_mask(call.batch, call.queries, call.keys, key.device).expand(shape), want)
    place = tuple(torch.randint(size, (50,)) for size in shape)
    assert torch.equal(terms.seen(*place).expand(50), want[place])


@given(calls(longest=400))
def test_spans_and_histories(call: Call) -> None:
    """Spans are where the documentation says; history, dense span and what nobody sees are all keys, each once."""
    terms, config = call.visibility(), call.config
    geometry = Geometry.of(torch.empty(1, 1, call.queries, 8), torch.empty(1, 1, call.keys, 8), terms, config)
    want = [formulas.span(i, call.queries, call.keys, terms, config) for i in range(geometry.segments)]
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
    want = torch.tensor([[formulas.draw(k, s) for k in keys] for s in segments], dtype=torch.float64)
    assert torch.equal(draws(torch.tensor(keys), torch.tensor(segments)[:, None]).double(), want)


def test_draws_are_uniform_and_neighbours_differ() -> None:
    """As many in each tenth; neighbours, along keys and along segments, are both small less often than by chance."""
    drawn = draws(torch.arange(2000), torch.arange(500)[:, None])
    assert (torch.histc(drawn, 10, 0, 1) / drawn.numel() - 0.1).abs().max() < 1e-3
    for pair in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        both = ((pair[0] < 0.3) & (pair[1] < 0.3)).double().mean()
        assert both < 0.09


@pytest.mark.parametrize("lists", ["group", "head"])
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
        threshold=threshold, lists=lists, measure=measure, sample=1, near_keys=0, first_keys=0, channels=None
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


@given(st.integers(0, 2**31), st.lists(st.integers(0, 9), max_size=6), st.booleans())
def test_the_online_softmax_is_the_softmax(seed: int, sizes: list[int], far: bool) -> None:
    """Also where whole blocks are hidden, where none is added, and where logits leap."""
    generator = torch.Generator().manual_seed(seed)
    softmax, logits, values = OnlineSoftmax.empty(torch.empty(2, 3, 1).double(), 4), [], []
    for size in sizes:
        part = torch.randn(2, 3, size, generator=generator, dtype=torch.float64) * (300 if far else 1)
        part = part.masked_fill(torch.rand(2, 3, size, generator=generator) < 0.3, -math.inf)
        value = torch.randn(2, size, 4, generator=generator, dtype=torch.float64)
        before = torch.cat(logits, -1).exp().sum(-1) if logits else torch.zeros(2, 3).double()
        gain = softmax.add(part, value)
        if not far and size:
            usual = before > 0
            assert largest_difference(gain[usual], (part.exp().sum(-1) / before)[usual]) < 1e-9
        logits.append(part)
        values.append(value)
    mass = torch.cat([torch.full((2, 3, 1), -math.inf).double(), *logits], -1)
    want = mass.softmax(-1).nan_to_num(0)[..., 1:] @ torch.cat([torch.empty(2, 0, 4).double(), *values], 1)
    assert largest_difference(softmax.output(), want) < 1e-12
    lse = mass.logsumexp(-1)
    assert torch.equal(lse == -math.inf, softmax.lse() == -math.inf)
    assert largest_difference(softmax.lse().exp(), lse.exp()) <= 1e-12 * float(lse.exp().max()) or far
    sinks = torch.tensor([0.5, -math.inf, 2.0]).double()
    result = AttentionResult(
        softmax.output()[None].transpose(1, 2), softmax.lse()[None].mT, torch.zeros(1, 3, 1).long()
    )
    sunk = add_sinks(result, sinks)
    whole = torch.cat([sinks.expand(2, 3)[..., None], mass], -1)
    share = whole.softmax(-1)[..., 2:]
    share = torch.where(whole.amax(-1, keepdim=True) == -math.inf, 0, share)
    everything = share @ torch.cat([torch.empty(2, 0, 4).double(), *values], 1)
    assert largest_difference(sunk.output[0].transpose(0, 1), everything) < 1e-12


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
    query = torch.randn(2, heads, length, 8, dtype=torch.float64)
    want = np.stack([formulas.pooled(x.numpy(), config) for x in query])
    assert largest_difference(pool_guides(query, config), torch.from_numpy(want)) < 1e-12


def test_the_share_of_groups_in_all_channels_is_counted() -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(3, 4, 50, 16, generator=generator) * torch.tensor([0.3, 3.0, 0.2, 0.1])[:, None, None]
    key = torch.randn(3, 4, 60, 16, generator=generator)
    config = S2OConfig(channels=8)
    lacks = [
        formulas.scores(q[None].double().numpy(), k.double().numpy(), np.ones(60, dtype=bool), 1.0, config)[1] == 0
        for q, k in zip(query.flatten(0, 1), key.flatten(0, 1), strict=True)
    ]
    assert 0 < np.mean(lacks) < 1
    assert share_in_all_channels(query, key, 1.0, config) == np.mean(lacks)
