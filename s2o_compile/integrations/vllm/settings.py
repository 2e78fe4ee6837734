"""The settings of an engine: environment variables, and what its configuration says of s2o, which counts more."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ...ops import S2OConfig

_VARIABLES: dict[str, type] = {
    "S2O_THRESHOLD": float,
    "S2O_MIN_LENGTH": int,
    "S2O_LAST_QUERIES": int,
    "S2O_ERROR_BUDGET": float,
}
_KEY = "s2o"


def settings_of(additional_config: Any) -> S2OConfig:
    """The settings of an engine.

    Args:
        additional_config: vLLM's ``--additional-config``, whose entry ``"s2o"`` holds options of ``torch.compile``'s
            backend, as in ``{"s2o": {"threshold": 0.004}}``.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is unknown or has a value that is not allowed, a variable is no number, or there is a
            calibration.
    """
    options = _of_environment()
    if isinstance(additional_config, Mapping):
        options |= additional_config.get(_KEY) or {}
    if options.get("calibration") is not None:
        raise ValueError(
            f"calibration must be None in vLLM, not {options['calibration']!r}: its sites are modules of a model of "
            "transformers, which vLLM fuses"
        )
    return S2OConfig.from_options(options).resolved()


def _of_environment() -> dict[str, Any]:
    options = {}
    for variable, kind in _VARIABLES.items():
        text = os.environ.get(variable)
        if text is None:
            continue
        try:
            options[variable.removeprefix("S2O_").lower()] = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"the environment variable {variable} must be {what}, not {text!r}") from None
    return options
