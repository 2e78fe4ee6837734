"""The command line ``s2o``, one command a file."""

from . import bench, calibrate, demo, doctor, explain, view
from .app import main

__all__ = ["bench", "calibrate", "demo", "doctor", "explain", "main", "view"]
