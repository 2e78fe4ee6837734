"""Settings of sites by a calibration, once it is certain that the file is for the model at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from ..ops import S2OConfig
from ..passes import Refused
from .file import Calibration, CalibrationError
from .identity import graph_weights


def site_settings(config: S2OConfig, module: GraphModule, inputs: Sequence[Any]) -> Callable[[str], S2OConfig]:
    """The settings of each site of a graph, by name.

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
    path, calibration = config.calibration, Calibration.load(config.calibration)
    check_weights(calibration, graph_weights(module, inputs), path)
    rule = calibrated(config, calibration)

    def of_site(name: str) -> S2OConfig:
        if name not in calibration.sites:
            raise CalibrationError(
                f"calibration {str(path)!r} has no site {name!r}: it is for another model, or its inputs did not reach it"
            )
        site = calibration.sites[name]
        if site.dense:
            raise Refused(f"the calibration leaves it dense: {site.dense}")
        assert site.threshold is not None
        return dataclasses.replace(rule, threshold=site.threshold)

    return of_site


def calibrated(config: S2OConfig, calibration: Calibration) -> S2OConfig:
    """The settings that a calibration was made with, in place of defaults.

    Raises:
        CalibrationError: The user asked for others, with which the thresholds would not keep the budget.
    """
    default = S2OConfig()
    for name, value in calibration.settings.items():
        given = getattr(config, name)
        if given not in (getattr(default, name), value):
            raise CalibrationError(
                f"{name} must be {value!r}, as in the calibration {str(config.calibration)!r}, not {given!r}"
            )
    return dataclasses.replace(config, calibration=None, **calibration.settings)


def check_weights(calibration: Calibration, weights: dict[str, torch.Tensor], path: Any) -> None:
    """Compare those weights of a model that the calibration knows.

    Raises:
        CalibrationError: One is another.
    """
    name = calibration.model.mismatch(weights)
    if name is not None:
        raise CalibrationError(
            f"calibration {str(path)!r} is for another model, a {calibration.model.kind} of "
            f"{calibration.model.parameters:,} parameters: {name} differs"
        )
