"""Sparse long-context attention as a compiler feature of PyTorch: ``torch.compile(model, backend="s2o")``.

Nothing is imported before it is used, not even PyTorch, whose import takes seconds that ``s2o --help`` would wait for.
The operator ``torch.ops.s2o.attention`` and the backend are there once this package and PyTorch are imported, in any
order, and ``attn_implementation="s2o"`` once transformers is.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from typing import TYPE_CHECKING, Any

from .after_import import after_import

if TYPE_CHECKING:
    from ._attention import attention
    from ._attention_varlen import attention_varlen
    from ._explain import explain
    from ._export import export
    from ._profile import Profile, SiteProfile, profile
    from .backend import S2OBackend, s2o
    from .calibration.calibrate import calibrate
    from .calibration.file import Calibration, CalibrationError
    from .integrations.settings import configure
    from .ops import Ranking, S2OConfig
    from .passes import Report
    from .view import visualize

    __version__: str

__all__ = [
    "Calibration",
    "CalibrationError",
    "Profile",
    "Ranking",
    "Report",
    "S2OBackend",
    "S2OConfig",
    "SiteProfile",
    "__version__",
    "attention",
    "attention_varlen",
    "calibrate",
    "configure",
    "explain",
    "export",
    "profile",
    "s2o",
    "visualize",
]

_HOMES = {
    "Calibration": "calibration.file",
    "CalibrationError": "calibration.file",
    "Profile": "_profile",
    "Ranking": "ops",
    "Report": "passes",
    "S2OBackend": "backend",
    "S2OConfig": "ops",
    "SiteProfile": "_profile",
    "attention": "_attention",
    "attention_varlen": "_attention_varlen",
    "calibrate": "calibration.calibrate",
    "configure": "integrations.settings",
    "explain": "_explain",
    "export": "_export",
    "profile": "_profile",
    "s2o": "backend",
    "visualize": "view",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module(".version", __name__).VERSION
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_operator() -> None:
    from . import ops  # noqa: F401


def _register_backend() -> None:
    """Register the backend where no entry point does: this is a copy of the package that is not installed."""
    from importlib.metadata import entry_points

    if not entry_points(group="torch_dynamo_backends", name="s2o"):
        from torch._dynamo import register_backend

        from .backend import s2o

        with contextlib.suppress(AssertionError):  # This module was reloaded.
            register_backend(s2o, name="s2o")


def _register_with_transformers() -> None:
    try:
        from .integrations import transformers  # noqa: F401
    except ImportError as error:
        warnings.warn(f"attn_implementation='s2o' needs transformers 5.10 or later: {error}", stacklevel=2)


def _register_sharding_rules() -> None:
    try:
        from .ops.sharding import register_rules

        register_rules()
    except (AttributeError, ImportError, TypeError) as error:
        warnings.warn(f"s2o.attention takes no DTensors with this version of PyTorch: {error}", stacklevel=2)


after_import("torch", _register_operator)
after_import("torch.distributed.tensor", _register_sharding_rules)
after_import("torch._dynamo", _register_backend)
after_import("transformers.modeling_utils", _register_with_transformers)
