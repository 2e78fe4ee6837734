"""The demo: a small model reads a long document with dense and with sparse attention."""

from .errors import DemoError
from .progress import Progress
from .results import Results
from .run import Settings, run_demo

__all__ = ["DemoError", "Progress", "Results", "Settings", "run_demo"]
