"""The command line ``s2o``, one command a file."""

from . import calibrate, demo, doctor, explain, view
from .app import main

__all__ = ["calibrate", "demo", "doctor", "explain", "main", "view"]
