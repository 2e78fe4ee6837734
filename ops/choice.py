"""Sparse or dense: chosen on the host, by shape and device alone, without a synchronisation."""

from __future__ import annotations

import torch

from .config import S2OConfig
from .sizes import statically_known_true

DEFAULT_MIN_LENGTH = {"cpu": 8192, "cuda": 32768}
"""Fewest keys from which the default settings were measured to beat SDPA: see the README."""

DENSE_AT_ANY_LENGTH = 2**62
"""As `min_length`: no call has so many keys."""


def choose_sparse(queries: int, keys: int, device: torch.device, config: S2OConfig) -> bool | None:
    """Whether a call is worth the sparse path: enough keys, and more queries than would be attended densely anyway.

    `min_length` 0 always takes the sparse path. None where the lengths are symbolic and the answer depends on them.
    """
    least = config.min_length
    if least is None:
        least = DEFAULT_MIN_LENGTH.get(device.type, DEFAULT_MIN_LENGTH["cuda"])
    if least == 0:
        return True
    densely = max(config.last_queries, config.segment)
    if statically_known_true(keys >= least) and statically_known_true(queries > densely):
        return True
    if statically_known_true(keys < least) or statically_known_true(queries <= densely):
        return False
    return None
