"""What cannot be viewed."""

from __future__ import annotations


class ViewError(ValueError):
    """A model or an argument that cannot be viewed; the message is one sentence."""
