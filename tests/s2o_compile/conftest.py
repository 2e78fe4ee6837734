from __future__ import annotations

from ..passes.conftest import fresh_dynamo

__all__ = ["fresh_dynamo"]
