"""How each operation that masks are built with is read."""

from __future__ import annotations

from . import read_creation, read_elementwise, read_views
from .reader import Handler

HANDLERS: dict[str, Handler] = {**read_creation.HANDLERS, **read_elementwise.HANDLERS, **read_views.HANDLERS}
"""The handlers by the names of operations."""
