"""Whether a method finds other values than dense attention does, on the same prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .run import Outcome


@dataclass(frozen=True)
class Flips:
    """A method against dense attention, at one place of some prompts.

    Attributes:
        asked: Values asked for.
        kept: Found by both.
        lost: Found by dense attention alone.
        gained: Found by the method alone.
        worse: Prompts of which the method finds fewer values.
        better: Prompts of which it finds more.
        nats: Sum over the values of their negative log-likelihoods with the method.
        nats_dense: The same with dense attention.
    """

    asked: int = 0
    kept: int = 0
    lost: int = 0
    gained: int = 0
    worse: int = 0
    better: int = 0
    nats: float = 0.0
    nats_dense: float = 0.0

    @classmethod
    def of(cls, outcome: Outcome, dense: Outcome, place: str) -> Flips:
        """Of one prompt."""
        here, there = outcome.found[place], dense.found[place]
        pairs = list(zip(here, there, strict=True))
        return cls(
            asked=len(pairs),
            kept=sum(a and b for a, b in pairs),
            lost=sum(b and not a for a, b in pairs),
            gained=sum(a and not b for a, b in pairs),
            worse=int(sum(here) < sum(there)),
            better=int(sum(here) > sum(there)),
            nats=sum(outcome.nats[place]),
            nats_dense=sum(dense.nats[place]),
        )

    def __add__(self, other: Flips) -> Flips:
        return Flips(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def found(self) -> int:
        """Found by the method."""
        return self.kept + self.gained

    @property
    def found_dense(self) -> int:
        """Found by dense attention."""
        return self.kept + self.lost

    @property
    def p_value(self) -> float:
        """`mcnemar` of the prompts, which are independent of each other, as the values of one prompt are not."""
        return mcnemar(self.worse, self.better)


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact test: how likely flips that go either way by chance are to be at least as one-sided as these."""
    flips = lost + gained
    tail = sum(math.comb(flips, count) for count in range(min(lost, gained) + 1))
    return min(1.0, 2 * tail / 2**flips)
