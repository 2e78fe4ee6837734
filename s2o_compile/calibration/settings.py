"""Settings of sites by a calibration, once it is certain that the file is for the model at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ..ops import S2OConfig
from ..ops.dispatch import DENSE_AT_ANY_LENGTH
from ..passes import Refused
from .file import Calibration, CalibrationError, Site
from .identity import Identity, graph_weights


def site_settings(config: S2OConfig, module: GraphModule, inputs: Sequence[Any]) -> Callable[[str], S2OConfig]:
    """The settings of each site of a graph, by name.

    A file is known to be for the model by the names of the sites, and by digests of those of their weights that the
    graph holds as inputs or parameters; a graph that holds none is judged by names alone. The class and the number of
    parameters, which no graph has, are compared in `module_settings`.

    Args:
        config: What the user asked for.
        module: The graph, from which the weights are read that tell models apart.
        inputs: Its inputs, as Dynamo passes them.

    Returns:
        A function that gives the settings of a site, and raises `Refused` if it is to stay dense. With a calibration,
        it raises `CalibrationError` for a site that the file does not have.

    Raises:
        CalibrationError: The file cannot be read, is for another model, or was made with other settings.
    """
    if config.calibration is None:
        return lambda site: config
    calibration = Calibration.load(config.calibration)
    other = calibration.model.mismatch(graph_weights(module, inputs))
    if other is not None:
        raise CalibrationError(
            f"calibration {str(config.calibration)!r} is for another model, {calibration.model}: {other} is not the "
            "same here"
        )
    rule = _rule(config, calibration)

    def of_site(name: str) -> S2OConfig:
        if name not in calibration.sites:
            raise CalibrationError(
                f"calibration {str(config.calibration)!r} has no site {name!r}: it is for another model, or its inputs "
                "did not reach this part"
            )
        site = calibration.sites[name]
        if site.dense:
            raise Refused(f"the calibration leaves it dense: {site.dense}")
        return _with_threshold(rule, site)

    return of_site


def module_settings(config: S2OConfig, model: torch.nn.Module) -> dict[str, S2OConfig]:
    """The settings of the attention modules of a model, by name; those that are to stay dense do at any length.

    Args:
        config: What the user asked for, with a calibration.
        model: The model.

    Raises:
        CalibrationError: The file cannot be read, is for another model, or was made with other settings.
    """
    assert config.calibration is not None
    calibration = Calibration.load(config.calibration)
    found = Identity.of(model, calibration.sites)
    if found != calibration.model:
        raise CalibrationError(
            f"calibration {str(config.calibration)!r} is for another model, {calibration.model}, not {found}"
        )
    rule = _rule(config, calibration)
    dense = dataclasses.replace(rule, min_length=DENSE_AT_ANY_LENGTH)
    return {name: dense if site.dense else _with_threshold(rule, site) for name, site in calibration.sites.items()}


def _rule(config: S2OConfig, calibration: Calibration) -> S2OConfig:
    """The settings that a calibration was made with, in place of defaults.

    Raises:
        CalibrationError: The user asked for others, with which the thresholds would not keep the budget.
    """
    measured = S2OConfig.from_options(calibration.settings)
    default, wanted = _by_name(S2OConfig()), _by_name(measured)
    for name, given in _by_name(config).items():
        if given not in (default[name], wanted[name]):
            raise CalibrationError(
                f"{name} must be {wanted[name]!r}, as in the calibration {str(config.calibration)!r}, not {given!r}"
            )
    return dataclasses.replace(config, calibration=None, last_queries=measured.last_queries, ranking=measured.ranking)


def _by_name(config: S2OConfig) -> dict[str, Any]:
    """The settings that a calibration fixes."""
    return {"last_queries": config.last_queries, **dataclasses.asdict(config.ranking)}


def _with_threshold(rule: S2OConfig, site: Site) -> S2OConfig:
    assert site.threshold is not None
    return dataclasses.replace(rule, threshold=site.threshold)
