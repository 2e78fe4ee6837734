"""All tasks. Each text is asked twice, about different values: in its middle, with text behind it, and at its end."""

from __future__ import annotations

from . import lookups, needles, stories, words
from .plan import Task

TASKS: dict[str, Task] = {
    "niah": Task(needles.single, has_depth=True),
    "niah_single_1": Task(needles.single, has_depth=True, filler="noise"),
    "niah_single_2": Task(needles.single, has_depth=True, filler="prose"),
    "niah_multikey_2": Task(needles.numbers_among_needles, has_depth=True),
    "niah_multikey_3": Task(needles.uuids_among_needles, has_depth=True),
    "multikey": Task(needles.multikey),
    "multivalue": Task(needles.multivalue),
    "multiquery": Task(needles.multiquery),
    "vt": Task(lookups.variable_tracking, filler="noise"),
    "cwe": Task(words.common_words),
    "fwe": Task(words.coded_words),
    "story-retrieval": Task(stories.retrieval),
    "story-multihop": Task(stories.multihop, has_depth=True),
    "story-filtering": Task(stories.filtering),
    "key-value": Task(lookups.key_value),
    "constants": Task(lookups.constants),
}
"""By name, those of RULER (arXiv 2404.06654) by its own; all run by default."""
