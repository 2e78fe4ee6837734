"""A fixed sample of calls of the operator."""

from __future__ import annotations

import pytest

from . import calls


@pytest.mark.parametrize("first", range(0, 200, 100))
def test_calls_are_right(first: int) -> None:
    tried = [calls.attempt(seed, []) for seed in range(first, first + 100)]
    assert [(x.kind, x.message, x.script) for x in tried if x.is_fault] == []
    assert sum("exact" in x.counts for x in tried) >= 25
