"""The settings of a model of transformers, kept in its own configuration."""

from __future__ import annotations

import functools
from typing import Any

import torch

from ..ops import S2OConfig

IMPLEMENTATION = "s2o"
"""The name of the attention implementation, and the attribute of a model's configuration that holds its settings."""


def configure(model: torch.nn.Module, config: S2OConfig) -> None:
    """Give a model of transformers, loaded with ``attn_implementation="s2o"``, its settings.

    They become the attribute ``s2o`` of the model's configuration, so that they are saved and loaded with it; models
    that share a configuration share them.

    Args:
        model: The model, or a module that holds it.
        config: The settings; models without any run with ``S2OConfig()``.

    Raises:
        ValueError: No part of the model runs with this attention.
    """
    found: dict[int, Any] = {
        id(module.config): module.config for module in model.modules() if hasattr(module, "config")
    }
    users = [
        settings for settings in found.values() if getattr(settings, "_attn_implementation", None) == IMPLEMENTATION
    ]
    if not users:
        raise ValueError(
            f"model must run with attn_implementation='s2o', and {type(model).__name__} does not: "
            "load it with that argument, or call model.set_attn_implementation('s2o')"
        )
    for settings in users:
        settings.s2o = config.arguments()


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of `S2OConfig` that a configuration of transformers holds, unchecked: Dynamo may read them."""
    return getattr(config, IMPLEMENTATION, None) or {}


def settings_of(config: Any) -> S2OConfig:
    """The settings in a configuration of transformers.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is unknown or has a value that is not allowed.
    """
    return _checked(**fields_of(config))


@functools.lru_cache(typed=True)
def _checked(**fields: Any) -> S2OConfig:
    """The settings of these fields, checked once: each layer asks for them in each forward pass."""
    return S2OConfig.from_options(fields)
