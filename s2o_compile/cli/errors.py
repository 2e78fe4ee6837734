"""What may be wrong with a command line."""

from __future__ import annotations


class UsageError(Exception):
    """An option has a value that cannot be used; the message is one sentence."""
