"""Sparse long-context attention as a compiler feature of PyTorch: ``torch.compile(model, backend="s2o")``."""

import importlib.metadata

from .attention import attention
from .backend import S2OBackend, s2o
from .explain import explain
from .ops import S2OConfig
from .passes import Report

__version__ = importlib.metadata.version("s2o-compile")
__all__ = ["Report", "S2OBackend", "S2OConfig", "__version__", "attention", "explain", "s2o"]
