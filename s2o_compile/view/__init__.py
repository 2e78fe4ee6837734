"""What sparse attention does to a model, as pictures: a report in HTML, and PNGs."""

from .errors import ViewError
from .results import View
from .visualize import visualize

__all__ = ["View", "ViewError", "visualize"]
