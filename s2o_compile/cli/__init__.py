"""The command line ``s2o``, one command a file."""

from . import demo, doctor, explain, view
from .app import main

__all__ = ["demo", "doctor", "explain", "main", "view"]
