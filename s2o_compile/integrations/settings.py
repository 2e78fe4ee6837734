"""The settings of a model of transformers, kept in its own configuration."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.file import CalibrationError
from ..calibration.settings import module_settings
from ..ops import Ranking, S2OConfig
from ..ops.layout import LAYOUTS, Sharding
from ..ops.old_names import sentence_on_old_name
from ..ops.process_group import sharding_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

IMPLEMENTATION = "s2o"
"""The name of the attention implementation, and the attribute of a model's configuration that holds its settings."""
_OWN = "s2o_settings"
"""The attribute of a module that a calibration gives settings of its own."""
_FIELDS = ("threshold", "min_length", "last_queries", "settings", "calibration")
_WRITTEN = (
    f"the attribute s2o of a model's configuration must be a dictionary of {', '.join(_FIELDS)}, "
    "as s2o_compile.configure writes it"
)


class _Fields(dict[str, Any]):
    """The fields of a model's settings, with what is not saved along with them."""

    sharding: Sharding | None = None


def configure(
    model: torch.nn.Module,
    config: S2OConfig,
    mesh: DeviceMesh | ProcessGroup | None = None,
    layout: str = LAYOUTS[0],
) -> None:
    """Give a model of transformers, loaded with ``attn_implementation="s2o"``, its settings.

    They become the attribute ``s2o`` of the model's configuration, so that they are saved and loaded with it; models
    that share a configuration share them. Of a calibration only the path is saved, and of a mesh nothing: a model that
    is loaded needs this call again for them.

    Args:
        model: The model, or a module that holds it; with a calibration, the module that was calibrated.
        config: The settings; models without any run with ``S2OConfig()``.
        mesh: The ranks over which sequences are sharded, as for ``s2o_compile.attention``: each rank calls the model
            with its own tokens, their `position_ids`, and the part of an `attention_mask` that belongs to them. Causal
            masks, windows and padding then are those of the whole sequence, and all other masks an error.
        layout: Which tokens a rank has, with a `mesh`; as for ``s2o_compile.attention``.

    Raises:
        CalibrationError: The calibration is not a file for this model.
        TypeError: `config` or `mesh` has the wrong type.
        ValueError: No part of the model runs with this attention, or `mesh` has several dimensions, or `layout` is
            unknown.
    """
    config, model = S2OConfig.of(config), getattr(model, "_orig_mod", model)
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
    if config.calibration is None:
        fields, own = _Fields(config.arguments()), {}
    else:
        own = module_settings(config, model)
        fields = _Fields(calibration=str(config.calibration), min_length=config.min_length)
    if mesh is not None:
        fields.sharding = sharding_of(mesh, layout)
    for settings in users:
        settings.s2o = fields
    for name, module in model.named_modules():
        vars(module).pop(_OWN, None)
        if name in own:
            setattr(module, _OWN, own[name].arguments())


def fields_of(module: torch.nn.Module) -> dict[str, Any]:
    """The operator's settings for a layer of transformers, unchecked: Dynamo may read them.

    Raises:
        CalibrationError: The model has a calibration that gives the layer none.
    """
    own: dict[str, Any] | None = getattr(module, _OWN, None)
    if own is not None:
        return own
    fields = getattr(module.config, IMPLEMENTATION, None) or {}
    if fields.get("calibration") is not None:
        raise CalibrationError(
            f"calibration {fields['calibration']!r} gives this {type(module).__name__} no settings: call "
            "s2o_compile.configure once the model is loaded, with a calibration whose inputs reached this layer"
        )
    return fields


def sharding_in(config: Any) -> Sharding | None:
    """How the sequences of a model with a configuration of transformers are sharded over ranks, if they are."""
    return getattr(getattr(config, IMPLEMENTATION, None), "sharding", None)


def settings_of(config: Any) -> S2OConfig:
    """The settings in a configuration of transformers.

    Raises:
        TypeError: They are no dictionary, or one of them has the wrong type.
        ValueError: One of them is unknown or has a value that is not allowed.
    """
    fields = getattr(config, IMPLEMENTATION, None) or {}
    if not isinstance(fields, dict) or any(isinstance(value, (dict, list)) for value in fields.values()):
        raise TypeError(f"{_WRITTEN}, not {fields!r}")
    return _checked(**{str(name): value for name, value in fields.items()})


@functools.lru_cache(maxsize=None, typed=True)
def _checked(**fields: Any) -> S2OConfig:
    """The settings of these fields, checked once: each layer asks for them in each forward pass."""
    unknown = {name: value for name, value in fields.items() if name not in _FIELDS}
    if unknown:
        raise ValueError(sentence_on_old_name(unknown, ()) or f"unknown option {min(unknown)!r}; {_WRITTEN}")
    options = {name: value for name, value in fields.items() if name != "settings"}
    return S2OConfig.from_options(options | {"ranking": Ranking.from_json(fields.get("settings", ""))})
