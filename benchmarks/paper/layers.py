"""The claims about a single operator: PBS-Attn at its published setting, and ours at its density and at its error."""

from __future__ import annotations

from collections.abc import Iterator

from ..captured import Layer
from ..frontier_report import least_cost
from ..judge import Judge, Score
from ..methods import METHODS, operator_scores
from .claims import DENSITY, ERROR, SETTINGS, Row

BASELINE = METHODS["PBS-Attn"]
THRESHOLDS = {
    "published rule": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 0.6, 0.9),
    "fastest": (1e-6, 4e-6, 1e-5, 2e-5, 1e-4, 1e-3),
    "lookups kept": (1e-4, 5e-4, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2, 0.128),
}
"""The sweep of each setting, from nearly all keys to few."""
NOT_REACHED = "not reached"


def measure(layer: Layer, every: int) -> Iterator[Row]:
    """Both claims on a layer, of which one strip of rows in `every` is judged."""
    judge = Judge(layer, every)
    assert BASELINE.default is not None
    (baseline,) = BASELINE.scores(judge, [BASELINE.default])
    subject = f"{layer.name}, {layer.length:,} tokens"
    found = {name: operator_scores(config, judge, THRESHOLDS[name]) for name, config in SETTINGS.items()}
    for name, scores in found.items():
        yield at_equal_density(scores, baseline, subject, name)
    for name, scores in found.items():
        yield at_equal_error(scores, baseline, subject, name)


def at_equal_density(scores: list[Score], baseline: Score, subject: str, settings: str) -> Row:
    """The baseline's error over the one that the settings, swept, have at its density."""
    bound, error = least_cost([(score.error, score.density) for score in scores], baseline.density)
    if bound == ">":
        return Row(ERROR, subject, settings, reason=NOT_REACHED)
    return Row(ERROR, subject, settings, baseline.error / error, bound and ">", baseline.density, error)


def at_equal_error(scores: list[Score], baseline: Score, subject: str, settings: str) -> Row:
    """The baseline's density over the one at which the settings, swept, have its error."""
    bound, density = least_cost([(score.density, score.error) for score in scores], baseline.error)
    _, work = least_cost([(score.work, score.error) for score in scores], baseline.error)
    if bound == ">":
        return Row(DENSITY, subject, settings, reason=NOT_REACHED)
    ratio = baseline.density / density
    return Row(DENSITY, subject, settings, ratio, bound and ">", density, baseline.error, work)
