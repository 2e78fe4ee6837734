"""Rules of others: what each must visit, by construction, and that all are causal and see their own positions."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.baselines.blocks import BLOCK, cover
from benchmarks.baselines.flexprefill import covering, divergence, flexprefill
from benchmarks.baselines.lines import slash_keys, slash_sums
from benchmarks.baselines.oracle import oracle
from benchmarks.baselines.pbs import pbs
from benchmarks.baselines.pooled_blocks import pooled_blocks
from benchmarks.baselines.streaming import streaming
from benchmarks.baselines.vertical_slash import vertical_slash
from benchmarks.baselines.visit import Visit
from benchmarks.baselines.xattention import xattention
from benchmarks.methods import Rule

RULES: dict[str, tuple[Rule, tuple[float, ...]]] = {
    "xattention": (xattention, (0.3, 0.6, 0.9)),
    "xattention 16": (partial(xattention, stride=16), (0.3, 0.6, 0.9)),
    "pbs": (pbs, (0.3, 0.6, 0.9)),
    "pooled": (pooled_blocks, (0.3, 0.6, 0.9)),
    "flexprefill": (flexprefill, (0.3, 0.6, 0.9)),
    "vertical-slash": (vertical_slash, (0.005, 0.01, 0.02)),
    "streaming": (streaming, (1, 50, 300)),
    "oracle": (oracle, (1e-2, 1e-3, 1e-4)),
    "block oracle": (partial(oracle, tile=128, block=128), (3e-3, 1e-3, 7e-4)),
}
LENGTHS = (2000, 1536, 100)


def head(length: int, seed: int = 0, channels: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key [length, channels] with peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(length, channels, generator=generator) for _ in range(2))
    return 2 * query, key


def visited(visit: Visit, length: int) -> torch.Tensor:
    """Which keys each tile visits [tiles, length]."""
    seen = torch.zeros(len(visit.mask), length, dtype=torch.bool)
    for tile in range(len(visit.mask)):
        keys = visit.keys(tile, length)
        assert len(keys) == len(keys.unique())
        seen[tile, keys] = True
    return seen


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", RULES)
def test_rules_are_causal_see_their_own_positions_and_widen(name: str, length: int) -> None:
    rule, settings = RULES[name]
    query, key = head(length)
    narrower = torch.zeros(0)
    for visit in rule(query, key, 0.2, settings):
        seen = visited(visit, length)
        owner = torch.arange(length) // visit.tile
        assert seen[owner, torch.arange(length)].all()
        # PBS-Attn permutes keys within segments of two tiles, whose own blocks are all visited, and masked.
        reach = (torch.arange(len(seen))[:, None] * visit.tile // 256 + 1) * 256 if name == "pbs" else None
        reach = (torch.arange(len(seen))[:, None] + 1) * visit.tile if reach is None else reach
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
