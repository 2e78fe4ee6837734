"""The least work and the fewest keys that cost least time over what was measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch

from ..ops.break_even import BreakEven
from .measure import Row


def fit(rows: Sequence[Row], shipped: BreakEven) -> tuple[float, float]:
    """The least work and the fewest keys; of several that do as well, those closest to what was shipped.

    What a choice costs is the logarithm of the time chosen over the shorter one, summed over the calls: no call counts
    for more than another because it is longer.

    Args:
        rows: What was measured; those where one time is missing do not count.
        shipped: The break-even that holds where nothing was measured.
    """
    timed = [(row.case.work, math.log(row.ratio)) for row in rows if row.ratio is not None]
    if not timed:
        return shipped.work, shipped.keys
    if all(gain <= 0 for _, gain in timed):
        return math.inf, math.inf
    work, keys = ([getattr(amount, name) for amount, _ in timed] for name in ("multiply_adds", "keys"))
    works, fewest = _candidates(work, shipped.work), _candidates(keys, shipped.keys)
    losses = _losses(work, keys, [gain for _, gain in timed], works, fewest)
    best = (losses <= losses.min() + 1e-6).nonzero().tolist()
    place = min(best, key=lambda at: _distance(works[at[0]], shipped.work) + _distance(fewest[at[1]], shipped.keys))
    return works[place[0]], fewest[place[1]]


def _losses(
    work: list[float], keys: list[float], gains: list[float], works: list[float], fewest: list[float]
) -> torch.Tensor:
    """The cost [works, fewest] of each choice."""
    has_work, has_keys = (
        torch.tensor(amounts, dtype=torch.float64) >= torch.tensor(least, dtype=torch.float64)[:, None]
        for amounts, least in ((work, works), (keys, fewest))
    )
    gain = torch.tensor(gains, dtype=torch.float64)
    # A call chosen to be sparse loses where the gain is below 0, one that is not where it is above.
    is_sparse = (has_work[:, None] & has_keys).double()
    return gain.clamp(min=0).sum() - is_sparse @ gain


def _candidates(amounts: Iterable[float], shipped: float) -> list[float]:
    """Between each two amounts the middle of their logarithms, one below all, and what was shipped."""
    known = sorted(set(amounts))
    middles = [_rounded((one * two) ** 0.5) for one, two in itertools.pairwise(known)]
    return [_rounded(known[0] / 2), *middles, *([shipped] if shipped < math.inf else [])]


def _rounded(amount: float) -> float:
    """To two digits."""
    return float(f"{amount:.1e}")


def _distance(one: float, other: float) -> float:
    if math.inf in (one, other):
        return 0.0 if one == other else 100.0
    return abs(math.log(max(one, 1e-9) / max(other, 1e-9)))
