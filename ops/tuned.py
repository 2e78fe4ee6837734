"""What ``s2o tune`` measured on a device, as small JSON files that are read once.

The files are in the folder that the environment variable `S2O_TUNED` names, by default ``~/.cache/s2o-compile``, one
for float32 on a device and one for half precision; `S2O_TUNED=0` ignores them.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch

FORMAT = "s2o tune, version 1"


class Broken(ValueError):
    """A file is not what ``s2o tune`` writes for a device."""


def folder() -> Path | None:
    """Where the files are; None if they are to be ignored."""
    chosen = os.environ.get("S2O_TUNED")
    if chosen == "0":
        return None
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(chosen or os.path.join(caches, "s2o-compile"))


def path_of(device: str, dtype: torch.dtype) -> Path | None:
    """The file of a device by its name, for calls of a dtype; None if files are to be ignored."""
    place, precision = folder(), "float32" if dtype == torch.float32 else "half"
    return place and place / f"tuned-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}-{precision}.json"


def read(device: str, dtype: torch.dtype) -> tuple[float, float, Path] | None:
    """The least work and the fewest keys of a device, and the file; None without one, or with a warning if broken."""
    path = path_of(device, dtype)
    if path is None:
        return None
    try:
        return *_parsed(path.read_text(encoding="utf-8"), device), path
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        warnings.warn(f"{path} is ignored: {reason}; s2o tune writes it anew, S2O_TUNED=0 ignores it", stacklevel=2)
        return None


def as_text(device: str, least_work: float, least_keys: float, **details: Any) -> str:
    """The file of a device; `details` are for people alone."""
    found = {"format": FORMAT, "device": device}
    limits = {"least_work": _number(least_work), "least_keys": _number(least_keys)}
    return json.dumps(found | limits | details, indent=2) + "\n"


def _parsed(text: str, device: str) -> tuple[float, float]:
    try:
        found = json.loads(text)
        limits = [found["least_work"], found["least_keys"]]
        is_whole = found["format"] == FORMAT and isinstance(found["device"], str)
    except (KeyError, RecursionError, TypeError, ValueError):
        is_whole = False
    if not is_whole or not all(map(_is_limit, limits)):
        raise Broken(f"it is no file of {FORMAT!r}")
    if found["device"] != device:
        raise Broken(f"it is of another device, {found['device']!r}")
    work, keys = (math.inf if limit is None else float(limit) for limit in limits)
    return work, keys


def _is_limit(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and 0 <= value < math.inf)


def _number(limit: float) -> float | None:
    return None if limit == math.inf else limit
