"""Settings by the names of their fields, those of the ranking too."""

from __future__ import annotations

import dataclasses
from typing import Any

from s2o_compile.ops import Ranking, S2OConfig

_OF_RANKING = {field.name for field in dataclasses.fields(Ranking)}


def config_of(**fields: Any) -> S2OConfig:
    """The configuration with these fields, of `S2OConfig` or of its `Ranking`."""
    ranking = Ranking(**{name: value for name, value in fields.items() if name in _OF_RANKING})
    return S2OConfig(ranking=ranking, **{name: value for name, value in fields.items() if name not in _OF_RANKING})
