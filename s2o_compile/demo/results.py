"""What the demo found out, as plain data."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from ..passes.report import Report
from ..testbed.document import Document
from ..testbed.predict import Prediction


@dataclass(frozen=True)
class Lookups:
    """Hidden values found at one place of the document.

    Attributes:
        asked: Values asked for.
        dense: Found by dense attention.
        s2o: Found by sparse attention.
        both: Found by both.
    """

    asked: int
    dense: int
    s2o: int
    both: int


@dataclass(frozen=True)
class Site:
    """What became of one attention site.

    Attributes:
        location: Where it is in the model's code.
        rewritten: Whether it became sparse.
        kind: 'sparse', 'dense', or 'dense, no mask' where the mask is proven and not computed.
        reason: Why, or why not.
        density: Share of the attention computed, by head; None where it was not measured.
    """

    location: str
    rewritten: bool
    kind: str
    reason: str
    density: list[float] | None


@dataclass(frozen=True)
class Results:
    """Everything that the demo reports.

    Attributes:
        model: Name of the model.
        device: The device, in words.
        dtype: Of the weights.
        tokens: Length of the document.
        config: Settings of sparse attention.
        seconds: Times of the prefills, by "eager" (not compiled), "inductor" and "s2o".
        compile_seconds: Of a first, short prefill, with what is compiled for it, by the same names.
        perplexity: Over the last stretch of text, by the same names.
        scored: Tokens in that stretch.
        agreement: Share of that stretch where both expect the same next token.
        middle: Values asked for in the middle.
        end: Values asked for at the end.
        sites: The model's attention sites, in order.
    """

    model: str
    device: str
    dtype: str
    tokens: int
    config: dict[str, Any]
    seconds: dict[str, list[float]]
    compile_seconds: dict[str, float]
    perplexity: dict[str, float]
    scored: int
    agreement: float
    middle: Lookups
    end: Lookups
    sites: list[Site]

    @property
    def speedup(self) -> float:
        """Median time of Inductor's prefills over that of s2o's."""
        return self.ratio("inductor")

    def ratio(self, name: str) -> float:
        """Median time of the prefills of a name over that of s2o's."""
        return statistics.median(self.seconds[name]) / statistics.median(self.seconds["s2o"])

    @property
    def rewritten(self) -> int:
        """How many sites became sparse."""
        return sum(site.rewritten for site in self.sites)

    @property
    def density(self) -> float | None:
        """Mean density of the sites it was measured for."""
        values = [value for site in self.sites for value in site.density or ()]
        return statistics.fmean(values) if values else None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self) | {
            "speedup": self.speedup,
            "rewritten": self.rewritten,
            "density": self.density,
        }


def compare(document: Document, dense: Prediction, s2o: Prediction, spans: list[range]) -> Lookups:
    """Count the values that two prefills find."""
    pairs = list(zip(dense.found(document, spans), s2o.found(document, spans), strict=True))
    return Lookups(len(pairs), sum(a for a, _ in pairs), sum(b for _, b in pairs), sum(a and b for a, b in pairs))


def read_sites(report: Report) -> list[Site]:
    """The attention sites of a report of `s2o_compile.explain`."""
    return [
        Site(decision.location, decision.rewritten, decision.kind, decision.reason, decision.density)
        for decision in report.decisions
    ]
