"""Finds the threshold of each attention site of a model from a few real inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .._console import Progress
from ..ops import S2OConfig
from ..passes import Decision
from ..writing import check_writable
from .file import Calibration, CalibrationError, Site, one_sentence
from .identity import Identity
from .search import find_threshold
from .sites import Measurement, SiteInputs, visit_sites

MARGIN = 0.4
"""The share of the budget that the inputs may use up: on texts of another kind errors were up to 3.7 times as large."""


def calibrate(
    model: torch.nn.Module,
    inputs: Any,
    *,
    error_budget: float,
    output: str | os.PathLike[str] | None = "calibration.json",
    config: S2OConfig | None = None,
    progress: bool = True,
) -> Calibration:
    """Find, for each attention site of a model, the threshold that keeps an error budget on some inputs.

    The budget is for the relative squared error of a call of a site: `sum |o - o_dense|^2 / sum |o_dense|^2` over all
    queries, heads and sequences of the call, against dense attention in the dtype of the model, on the inputs that the
    site has in the dense model. Errors of layers before it are not in it, nor what becomes of them in later ones. Every
    call that the inputs make keeps two fifths of the budget; the rest is for other texts: expected there, no bound.
    At a fixed threshold errors grow with the length and differ between kinds of text: calibrate at the length
    that you run, on texts of each kind. Sites whose visited keys and ranking cost as many multiplications as dense
    attention are marked dense.

    Args:
        model: The model, in evaluation mode. It may be compiled already; it is called as it was before.
        inputs: A tensor, or a tuple or mapping of positional or keyword arguments of the model; or a list of these.
        error_budget: The relative squared error that a call may have, above 0 and below 1; 1e-3 is about what the
            default threshold gives.
        output: The JSON file to write, for ``options={"calibration": output}``; None for none.
        config: The other settings of the operator, by default ``S2OConfig()``; all but `threshold` and `min_length`,
            which do not matter here, are kept in the file.
        progress: Whether to show a progress bar on stderr, if rich is installed.

    Returns:
        What was chosen.

    Raises:
        CalibrationError: There are no inputs, no attention of the model can become sparse, or the file cannot be
            written.
        TypeError: An argument has the wrong type.
        ValueError: An argument has a value that is not allowed.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if error_budget is None:
        raise TypeError("error_budget must be a number, not None")
    S2OConfig(error_budget=error_budget)
    arguments = [_arguments(item) for item in (inputs if isinstance(inputs, list) else [inputs])]
    if not arguments:
        raise CalibrationError("inputs must have at least one input, not an empty list")
    if output is not None:
        with one_sentence(output):
            check_writable(output)
    config = S2OConfig.of(config)
    settings = {name: value for name, value in config.to_dict().items() if name not in ("threshold", "min_length")}
    search = _Search(error_budget, config)
    with Progress(progress).step("Calibrating") as update:
        for item in arguments:
            search.run(model, item, lambda: update(done=search.calls, total=len(arguments) * search.rewritten))
    sites = search.sites()
    calibration = Calibration(
        Identity.of(model, sites), error_budget, search.lengths, settings, str(torch.__version__), sites
    )
    if output is not None:
        calibration.save(output)
    return calibration


def _arguments(item: Any) -> Mapping[str, Any] | tuple[Any, ...]:
    """One input as the arguments of a call."""
    if isinstance(item, torch.Tensor):
        return (item,)
    if isinstance(item, (Mapping, tuple)):
        return item
    raise TypeError(f"inputs must be tensors, or tuples or mappings of arguments, not {type(item).__name__}")


class _Search:
    """What is known so far of each site.

    Attributes:
        decisions: What was decided of each site, in the graphs of the last input.
        calls: How many calls were searched.
        lengths: The largest number of queries of each input.
    """

    def __init__(self, error_budget: float, config: S2OConfig) -> None:
        self.error_budget, self.config = error_budget, config
        self.decisions: list[Decision] = []
        self.calls = 0
        self.lengths: list[int] = []
        self._found: dict[str, Measurement | None] = {}
        self._ranking: dict[str, float] = {}

    @property
    def rewritten(self) -> int:
        """How many sites an input is known to have."""
        return sum(decision.rewritten for decision in self.decisions)

    def run(
        self, model: torch.nn.Module, arguments: Mapping[str, Any] | tuple[Any, ...], progress: Callable[[], None]
    ) -> None:
        """Call the model once, and look for a threshold in each call of a site."""

        def visit(call: SiteInputs) -> None:
            self._visit(call)
            self.lengths[-1] = max(self.lengths[-1], call.query.shape[2])
            self.calls += 1
            progress()

        self.decisions = []
        self.lengths.append(0)
        visit_sites(model, arguments, self.config, visit, self.decisions.extend)

    def _visit(self, call: SiteInputs) -> None:
        """Lower the threshold of a site as far as this call needs it."""
        known = self._found.get(call.site)
        if call.site in self._found and known is None:
            return
        found = find_threshold(call.measure, MARGIN * self.error_budget, None if known is None else known.threshold)
        if known is None or found is None or found.threshold < known.threshold or found.error > known.error:
            self._found[call.site] = found
            self._ranking[call.site] = call.ranking_share(self.config)

    def sites(self) -> dict[str, Site]:
        """What is chosen for each site.

        Raises:
            CalibrationError: There are none.
        """
        if not self._found:
            reason = next((f"{item.name}: {item.reason}" for item in self.decisions), "no attention was found")
            raise CalibrationError(f"model has no attention that can become sparse; {reason}")
        return {name: _site(found, self._ranking[name]) for name, found in self._found.items()}


def _site(found: Measurement | None, ranking: float) -> Site:
    if found is None:
        return Site(None, None, None, "no threshold kept the budget")
    work = found.density + ranking
    reason = f"visiting {found.density:.3f} and ranking for {ranking:.3f} costs no less" if work >= 1 else ""
    return Site(found.threshold, found.density, found.error, reason)
