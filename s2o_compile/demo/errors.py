"""What may go wrong for reasons the user can change."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot run as asked; the message is one sentence that says why and what to do."""
