"""Rules of others: what each must visit, by construction, and that all are causal and see their own positions."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines import blocks
from benchmarks.baselines.blocks import BLOCK, cover
from benchmarks.baselines.flashprefill import flashprefill
from benchmarks.baselines.flashprefill_v2 import flashprefill_v2
from benchmarks.baselines.flexprefill import covering, divergence, flexprefill
from benchmarks.baselines.group import Group, GroupRule, Rule, by_head
from benchmarks.baselines.kascade import Kascade, Plan, best_keys, choose_anchors, make_plan, pooled_attention
from benchmarks.baselines.lines import slash_keys, slash_sums
from benchmarks.baselines.oracle import oracle
from benchmarks.baselines.pbs import pbs
from benchmarks.baselines.pooled_blocks import pooled_blocks
from benchmarks.baselines.prism import band, prism
from benchmarks.baselines.quoka import CHUNK, quoka
from benchmarks.baselines.stem import budget, stem
from benchmarks.baselines.streaming import streaming
from benchmarks.baselines.vertical_slash import vertical_slash
from benchmarks.baselines.visit import Visit
from benchmarks.baselines.xattention import xattention
from benchmarks.captured import Layer

HEADS = 2
RULES: dict[str, tuple[Rule, tuple[float, ...]]] = {
    "xattention": (xattention, (0.3, 0.6, 0.9)),
    "xattention 16": (partial(xattention, stride=16), (0.3, 0.6, 0.9)),
    "pbs": (pbs, (0.3, 0.6, 0.9)),
    "pooled": (pooled_blocks, (0.3, 0.6, 0.9)),
    "flexprefill": (flexprefill, (0.3, 0.6, 0.9)),
    "vertical-slash": (vertical_slash, (0.005, 0.01, 0.02)),
    "streaming": (streaming, (1, 50, 300)),
    "flashprefill": (flashprefill, (1.0, 0.95, 0.9)),
    "prism": (prism, (0.2, 0.4, 0.5)),
    "oracle": (oracle, (1e-2, 1e-3, 1e-4)),
    "block oracle": (partial(oracle, tile=128, block=128), (3e-3, 1e-3, 7e-4)),
}
GROUP_RULES: dict[str, tuple[GroupRule, tuple[float, ...]]] = {
    **{name: (by_head(rule), settings) for name, (rule, settings) in RULES.items()},
    "flashprefill v2": (flashprefill_v2, (1.0, 0.95, 0.9)),
    "stem": (stem, (0.1, 0.2, 0.4)),
    "quoka": (quoka, (0.05, 0.1, 0.2)),
}
EVERYTHING: dict[str, tuple[GroupRule, float]] = {
    "xattention": (by_head(xattention), 1.0),
    "flashprefill": (by_head(flashprefill), 0.0),
    "flashprefill v2": (flashprefill_v2, 0.0),
    "stem": (stem, 1.0),
    "stem, relaxed": (partial(stem, relaxed=True), 0.1),
    "prism": (by_head(prism), 1.0),
    "quoka": (quoka, 1.0),
}
"""The setting at which each is dense attention, for 2,000 positions."""
LENGTHS = (2000, 1536, 100)


def head(length: int, seed: int = 0, channels: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [length, channels] with peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(length, channels, generator=generator) for _ in range(2))
    return 2 * query, key


def group(length: int, seed: int = 0, channels: int = 32) -> Group:
    """Query heads with peaked attention, the first of them those of `head`."""
    query, key = head(length, seed, channels)
    more, value = head(length, seed + 1, channels)
    return Group(torch.stack([query, more]), key, value, 0.2)


def planted(query: torch.Tensor, key: torch.Tensor) -> Group:
    """Query heads [G, L, D] over keys [L, D], whose values are all the same."""
    return Group(query, key, torch.ones_like(key), 1.0)


def visited(visit: Visit, length: int) -> torch.Tensor:
    """Which keys each tile visits [tiles, length]."""
    seen = torch.zeros(len(visit.mask), length, dtype=torch.bool)
    for tile in range(len(visit.mask)):
        keys = visit.keys(tile, length)
        assert len(keys) == len(keys.unique())
        seen[tile, keys] = True
    return seen


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", GROUP_RULES)
def test_rules_are_causal_see_their_own_positions_and_widen(name: str, length: int) -> None:
    rule, settings = GROUP_RULES[name]
    narrower = torch.zeros(0)
    for visits in rule(group(length), settings):
        assert len(visits) == HEADS
        visit = visits[0]
        seen = visited(visit, length)
        owner = torch.arange(length) // visit.tile
        assert seen[owner, torch.arange(length)].all()
        # PBS-Attn permutes keys within segments of two tiles, whose own blocks are all visited, and masked.
        reach = (torch.arange(len(seen))[:, None] * visit.tile // 256 + 1) * 256 if name == "pbs" else None
        reach = (torch.arange(len(seen))[:, None] + 1) * visit.tile if reach is None else reach
        reach = -(-reach // visit.block) * visit.block
        assert not (seen & (torch.arange(length) >= reach)).any()
        if len(narrower):
            assert not (narrower & ~seen).any()
        narrower = seen
        assert 0 < visit.density(length) <= 1 + 256 / length
        assert visit.ranking >= 0
    if length == 2000:
        assert not seen[-1].all()


def test_everything_visited_has_density_one() -> None:
    for length, tile in ((100, 32), (1000, 64), (2000, 128)):
        starts = torch.arange(0, length, tile)
        mask = torch.arange(length) < (starts[:, None] + tile).clamp_max(length)
        assert Visit(mask, tile, 1, 0).density(length) == 1


def test_cover_takes_the_largest_that_hold_the_share() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.05, 0.35]])
    forced = torch.tensor([[False, False, True, False]])
    assert cover(scores, 0.5, forced).tolist() == [[False, True, True, False]]
    assert cover(scores, 0.6, forced).tolist() == [[False, True, True, True]]
    assert cover(scores, 0.0, forced).tolist() == [[False, False, True, False]]


def test_xattention_finds_pairs_on_the_antidiagonal_alone() -> None:
    """A pair counts where the offsets of query and key in their strides add up to the stride less one."""
    for offset, found in ((5, True), (6, False)):
        query, key = torch.zeros(1024, 8), torch.zeros(1024, 8)
        query[6 * BLOCK + offset : 7 * BLOCK : 8, 0] = 400
        key[2 * BLOCK + 40 + 2, 0] = 1
        (visit,) = xattention(query, key, 1.0, [0.2])
        assert bool(visit.mask[6, 2]) == found


def test_pbs_gathers_what_the_last_queries_attend() -> None:
    """One key in each segment's second half matters: permuted, it lies in the segment's first block."""
    query, key = torch.zeros(2048, 8), torch.zeros(2048, 8)
    query[:, 0] = 8
    planted = torch.arange(200, 2048, 256)
    key[planted, 0] = 1
    (visit,) = pbs(query, key, 1.0, [0.5])
    assert visit.order is not None
    assert torch.equal(visit.order.sort().values, torch.arange(2048))
    assert torch.equal(visit.order[::256][:-1], planted[:-1])
    assert (visit.order // 256 == torch.arange(2048) // 256).all()


def test_pooled_blocks_visits_the_block_with_the_mean_that_matches() -> None:
    query, key = torch.zeros(1024, 8), torch.zeros(1024, 8)
    query[6 * BLOCK : 7 * BLOCK, 0] = 1
    key[3 * BLOCK : 4 * BLOCK, 0] = 10
    (visit,) = pooled_blocks(query, key, 1.0, [0.9])
    assert visit.mask[6].nonzero()[:, 0].tolist() == [0, 3, 6]


@given(st.integers(1, 12), st.integers(0, 60), st.integers(0, 2**32))
def test_slash_sums_add_up_by_distance(rows: int, before: int, seed: int) -> None:
    length = before + rows
    attention = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)).tril(before)
    want = torch.zeros(length)
    for row in range(rows):
        for key in range(before + row + 1):
            want[before + row - key] += attention[row, key]
    torch.testing.assert_close(slash_sums(attention), want)


@given(st.sets(st.integers(0, 99), max_size=6), st.integers(1, 99), st.sampled_from([16, 64]))
def test_slash_keys_are_those_at_the_distances(distances: set[int], length: int, tile: int) -> None:
    at = torch.tensor([place in distances for place in range(length)])
    got = slash_keys(at, tile)
    for index, first in enumerate(range(0, length, tile)):
        rows = range(first, first + tile)
        want = {row - distance for row in rows for distance in distances if distance < length} & set(range(length))
        assert set(got[index].nonzero()[:, 0].tolist()) == want


def test_vertical_slash_finds_a_column_and_a_distance() -> None:
    query, key = head(2048, channels=64)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=torch.Generator().manual_seed(7)), dim=0)
    query, key = query / 2, key / 10
    key[700] = 8 * direction
    query += 2 * direction
    key[1000:] += torch.nn.functional.normalize(head(2048, 3, 64)[1], dim=1)[1000:] * 8
    query[1600:] += torch.nn.functional.normalize(head(2048, 3, 64)[1], dim=1)[1000:1448] * 4
    (visit,) = vertical_slash(query, key, 1.0, [0.04])
    seen = visited(visit, 2048)
    assert seen[11:, 700].all() and not seen[:10, 700].any()
    starts = torch.arange(640, 2048, 64)
    assert all(seen[start // 64, start - 600 : start - 600 + 64].all() for start in starts.tolist())
    assert not seen[24:, :1000].all(0)[30:].all()


def test_streaming_visits_sinks_and_window() -> None:
    query, key = head(1000)
    (visit,) = streaming(query, key, 1.0, [100])
    assert visit.ranking == 0
    assert visited(visit, 1000)[10].nonzero()[:, 0].tolist() == [0, 1, 2, 3, *range(640 - 99, 704)]


def test_flexprefill_chooses_by_how_well_means_predict() -> None:
    """Flat attention is predicted by means, and covered by blocks; one sharp key in a block is not."""
    flat = torch.zeros(4096, 8)
    (by_means,) = flexprefill(flat, flat, 1.0, [0.5])
    sharp, key = flat.clone(), flat.clone()
    sharp[:, 0], key[2700, 0] = 20, 1
    (lines,) = flexprefill(sharp, key, 1.0, [0.5])
    assert lines.mask[22:, 2700 // BLOCK].all()
    assert by_means.ranking - lines.ranking == 32 * 32 * 8
    widest = next(flexprefill(flat, flat, 1.0, [0.95]))
    assert widest.mask.sum() > by_means.mask.sum()


def test_covering_counts_the_largest() -> None:
    assert covering(torch.tensor([0.1, 0.6, 0.3]), 0.5) == 1
    assert covering(torch.tensor([0.1, 0.6, 0.3]), 0.8) == 2


def test_divergence_of_distributions() -> None:
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    assert divergence(p, p) == 0
    torch.testing.assert_close(divergence(p, q), torch.tensor(2.0).log().sqrt())


@pytest.mark.parametrize(("tile", "block"), [(32, 1), (128, 128)])
def test_the_oracle_visits_the_most_probable(tile: int, block: int) -> None:
    query, key = head(1024)
    mask = torch.ones(1024, 1024, dtype=torch.bool).tril()
    attention = (query.double() @ key.double().T * 0.3).masked_fill(~mask, -torch.inf).softmax(-1)
    mass = attention.unflatten(0, (-1, tile)).mean(1).unflatten(1, (-1, block)).mean(2)
    (visit,) = oracle(query, key, 0.3, [1e-3], tile, block)
    own = torch.eye(1024, dtype=torch.bool).unflatten(0, (-1, tile)).any(1).unflatten(1, (-1, block)).any(2)
    assert torch.equal(visit.mask, (mass >= 1e-3) | own)
    assert visit.density(1024) < 0.95


@pytest.mark.parametrize("name", EVERYTHING)
def test_whoever_keeps_everything_is_dense_attention(name: str) -> None:
    rule, setting = EVERYTHING[name]
    some = group(2000)
    (visits,) = rule(some, [setting])
    late = torch.ones(2000, 2000, dtype=torch.bool).triu(1)
    for visit in visits:
        seen = visited(visit, 2000)[torch.arange(2000) // visit.tile]
        assert (seen | late).all()
        assert visit.means is None or not visit.means.any()


def test_flashprefill_visits_what_one_query_of_a_tile_wants() -> None:
    query, key = torch.zeros(1600, 8), torch.zeros(1600, 8)
    query[10 * BLOCK + 77, 0] = 30
    key[4 * BLOCK : 5 * BLOCK, 0] = 1
    (visit,) = flashprefill(query, key, 1.0, [0.1])
    assert visit.mask[10].nonzero()[:, 0].tolist() == [0, 1, 4, 7, 8, 9, 10]
    assert visit.mask[9].nonzero()[:, 0].tolist() == list(range(10))  # all logits are the same
    (last,) = flashprefill(query, key, 1.0, [0.1], last_blocks=3)
    assert last.mask[10].sum() == 11 and torch.equal(last.mask[9], visit.mask[9])


def test_flashprefill_compares_with_the_largest_score() -> None:
    query, key = torch.zeros(1600, 8), torch.zeros(1600, 8)
    query[:, 0] = 1
    for block, logit in ((3, 5.0), (4, 3.0), (5, 1.0)):
        key[block * BLOCK : (block + 1) * BLOCK, 0] = logit
    for alpha, found in ((0.1, [3, 4]), (0.2, [3]), (0.01, [3, 4, 5])):
        (visit,) = flashprefill(query, key, 1.0, [alpha])
        assert [block for block in visit.mask[11].nonzero()[:, 0].tolist() if block in (2, 3, 4, 5, 6)] == found


def test_flashprefill_v2_chooses_for_all_heads_and_corrects_by_means() -> None:
    some = planted(torch.zeros(2, 1600, 8), torch.zeros(1600, 8))
    some.query[1, 10 * BLOCK + 5, 0] = 30
    some.key[4 * BLOCK : 5 * BLOCK, 0] = 1
    (visits,) = flashprefill_v2(some, [0.1])
    visit = visits[0]
    assert visit is visits[1] and visit.tile == 64 and visit.means is not None
    tile = 10 * BLOCK // 64
    assert visit.mask[tile].nonzero()[:, 0].tolist() == [0, 1, 4, 7, 8, 9, 10]
    assert visit.means[tile].nonzero()[:, 0].tolist() == [2, 3, 5, 6]
    (last,) = flashprefill_v2(some, [0.1], last_tiles=8)
    assert last[0].mask[tile].sum() == 11 and not last[0].mask[tile - 4].all()


@pytest.mark.parametrize("pairs", [1, 40_000])
def test_strips_of_rows_change_nothing(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = head(1000)
    (whole,), pooled = xattention(query, key, 0.2, [0.6]), pooled_attention(one_layer(length=300))
    monkeypatch.setattr(blocks, "PAIRS_AT_ONCE", pairs)
    assert len(list(blocks.strips(1000, 16))) > 10
    (cut,) = xattention(query, key, 0.2, [0.6])
    assert torch.equal(cut.mask, whole.mask)
    torch.testing.assert_close(pooled_attention(one_layer(length=300)), pooled)


def test_stem_counts_values_and_the_antidiagonal() -> None:
    for offset, found in ((5, True), (6, False)):
        some = planted(torch.zeros(1, 2048, 8), torch.zeros(2048, 8))
        some.query[0, 14 * BLOCK + offset : 15 * BLOCK : 8, 0] = 400
        some.key[6 * BLOCK + 40 + 2, 0] = 1
        ((visit,),) = stem(some, [1 / 16])
        assert bool(visit.mask[14, 6]) == found
        assert {0, 1, 2, 3, 11, 12, 13, 14} <= set(visit.mask[14].nonzero()[:, 0].tolist())
    some = planted(torch.zeros(1, 2048, 8), torch.zeros(2048, 8))
    some.value[7 * BLOCK : 8 * BLOCK] = 5
    ((visit,),) = stem(some, [1 / 16])
    assert visit.mask[14, 7] and visit.mask[14].sum() == 9


def test_stem_relaxes_short_texts() -> None:
    assert [budget(blocks, 0.2, True) for blocks in (40, 100, 256)] == [40, 50, 55]
    assert [budget(blocks, 0.2, False) for blocks in (40, 100, 256)] == [8, 20, 51]
    assert budget(256, 1.0, True) == 256


def test_prism_scores_bands_apart() -> None:
    """Each of two keys is found by its own band, however much stronger the other band is."""
    assert band(8, 0.5, True) == [0, 1, 4, 5]
    assert band(8, 0.75, False) == [1, 2, 3, 5, 6, 7]
    query, key = torch.zeros(2048, 16), torch.zeros(2048, 16)
    query[:, 0] = query[:, 7] = 4
    key[4 * BLOCK : 5 * BLOCK, 0] = 20
    key[9 * BLOCK : 10 * BLOCK, 7] = 200
    (visit,) = prism(query, key, 0.25, [0.9])
    assert visit.mask[14].nonzero()[:, 0].tolist() == [0, 4, 9, 14]


def test_quoka_follows_the_query_that_is_unlike_the_others() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.zeros(2, 1024, 16), torch.randn(1024, 16, generator=generator)
    query[:, :, 0] = 1
    query[:, 5 * CHUNK + 9] = torch.eye(16)[3]
    key[100] = 7 * torch.eye(16)[3]
    key[200] = 7 * torch.eye(16)[0]
    (visits,) = quoka(planted(query, key), [2 / (5 * CHUNK)])
    assert visits[0] is visits[1]
    seen = visits[0].mask[5].nonzero()[:, 0].tolist()
    assert len(seen) == 2 + CHUNK and {100, 200} < set(seen)
    assert 100 not in visits[0].mask[6].nonzero()[:, 0].tolist()


def one_layer(seed: int = 0, length: int = 2000) -> Layer:
    some = group(length, seed)
    return Layer("layer", torch.cat([some.query, some.query]), torch.stack([some.key, 2 * some.key]),
                 torch.stack([some.value, some.value]), 0.2)  # fmt: skip


def test_kascade_pools_the_attention_of_a_kv_head() -> None:
    some = one_layer(length=300)
    pooled = pooled_attention(some)
    late = torch.ones(300, 300, dtype=torch.bool).triu(1)
    query, key, _ = some.group(1)
    attention = (query.double() @ key.double().T * 0.2).masked_fill(late, -torch.inf).softmax(-1).mean(0)
    torch.testing.assert_close(
        pooled[1, :9].double(), attention[:288].unflatten(0, (9, 32)).mean(1), atol=1e-6, rtol=1e-4
    )
    torch.testing.assert_close(pooled[1, 9].double(), attention[288:].mean(0), atol=1e-6, rtol=1e-4)


def test_kascade_keeps_the_best_keys_and_the_own_ones() -> None:
    pooled = torch.rand(1, 63, 2000, generator=torch.Generator().manual_seed(0))
    chosen = best_keys(pooled, 0.1)
    assert chosen[0, 3].nonzero()[:, 0].tolist() == list(range(4 * 32))  # the fewest keys are more than there are
    tile, start = 60, 60 * 32
    earlier = chosen[0, tile, :start]
    assert earlier.sum() == int(0.1 * start) - 32 and chosen[0, tile, start : start + 32].all()
    assert not chosen[0, tile, start + 32 :].any()
    assert pooled[0, tile, :start][earlier].min() > pooled[0, tile, :start][~earlier].max()
    assert best_keys(pooled, 2.0)[0, tile, :start].all()


def test_kascade_reuses_what_the_last_anchor_chose() -> None:
    rule = Kascade(plan=Plan((0, 2), ((0, 1), (1, 0), (0, 1))))
    first, second, third = (rule.visits(one_layer(seed), index) for index, seed in enumerate((0, 3, 3)))
    assert [len(visits) for visits in (first, second, third)] == [4, 4, 4]
    assert torch.equal(second[0].mask, first[2].mask) and torch.equal(second[3].mask, first[1].mask)
    assert not torch.equal(third[0].mask, first[0].mask)
    assert first[0].ranking == 2000**2 * 32 and second[0].ranking == 0
    assert torch.equal(third[0].mask, Kascade().visits(one_layer(3), 7)[0].mask)


def test_kascade_plans_by_what_serves_best() -> None:
    similarity = torch.tensor([[1.0, 0.9, 0.1, 0.1], [0, 1, 0.2, 0.2], [0, 0, 1, 0.9], [0, 0, 0, 1]])
    assert choose_anchors(similarity, 2) == (0, 2)
    assert choose_anchors(similarity, 1) == (0,)
    assert choose_anchors(similarity, 4) == (0, 1, 2, 3)
    swapped = one_layer()
    swapped = replace(swapped, query=swapped.query.flip(0), key=swapped.key.flip(0))
    other = one_layer(9)
    plan = make_plan([one_layer(), swapped, other, other])
    assert plan.anchors == (0, 2) and plan.heads == ((0, 1), (1, 0), (0, 1), (0, 1))
