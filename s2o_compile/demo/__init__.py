"""The demo: a small model reads a long document with dense and with sparse attention."""

from .results import Results
from .run import Settings, run_demo

__all__ = ["Results", "Settings", "run_demo"]
