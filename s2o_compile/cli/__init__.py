"""The command line ``s2o``, one command a file."""

from . import bench, demo, doctor, explain, view
from .app import main

__all__ = ["bench", "demo", "doctor", "explain", "main", "view"]
