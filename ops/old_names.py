"""Settings from before 0.2.0 that were moved or removed, and what to say in their place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

_MOVED = ("segment", "pool", "guides", "channels", "lists", "measure", "sample", "near_keys")
_GONE = {
    "tile": "was removed: it follows segment",
    "max_weight": "was removed: say combine='max' or combine='mean', as in S2OConfig(ranking=Ranking(combine='mean'))",
    "mean_weight": "was removed: say combine='max' or combine='mean', as in S2OConfig(ranking=Ranking(combine='mean'))",
    "stop": "was removed: S2OConfig.paper() stops by gain, as does S2OConfig(ranking=Ranking(rule='gain', ...))",
    "tail": "is now the rule of Ranking ('sampled', 'means', or 'dropped' for 'none'): "
    "S2OConfig(ranking=Ranking(rule='dropped'))",
    "chunk": "was removed: only the paper's rule had a use for it, and takes 128 keys at once",
    "first_keys": "was removed: the first key is always visited",
    "workspace": "belongs to the process now: set the environment variable S2O_WORKSPACE to a number of bytes",
}


def sentence_on_old_name(settings: Mapping[str, Any], known: Collection[str]) -> str | None:
    """The sentence on the first name that settings have from before 0.2.0 and that is not `known` now, or None."""
    for name, value in settings.items():
        if name not in known and name in _GONE:
            return f"{name} {_GONE[name]}"
        if name not in known and name in _MOVED:
            value = "kv_head" if value == "group" else value
            return (
                f"{name} is now a field of Ranking: S2OConfig(ranking=Ranking({name}={value!r})), "
                f"or options={{'ranking': {{{name!r}: {value!r}}}}}"
            )
    return None
