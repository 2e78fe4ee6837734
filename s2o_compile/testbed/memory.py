"""Whether a prefill fits in memory, checked before it starts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .._console import UsageError
from .document import Document

HIDDEN_COPIES = 24
"""Activations of one layer in units of the hidden size, with what sparse attention holds besides."""


def check_memory(model: Any, document: Document) -> None:
    """Refuse a prefill that would not fit.

    Raises:
        UsageError: It needs more memory than there is.
    """
    device = next(model.parameters()).device
    needed, free = needed_bytes(model, document), free_bytes(device)
    if free is not None and needed > free:
        raise UsageError(
            f"A prefill of {len(document.tokens):,} tokens needs about {needed / 2**30:.1f} GiB and "
            f"{free / 2**30:.1f} GiB are free: use a smaller --length."
        )


def needed_bytes(model: Any, document: Document) -> int:
    """A generous estimate of what a prefill allocates beside the weights."""
    settings = model.config.get_text_config()
    widths = HIDDEN_COPIES * settings.hidden_size + 4 * getattr(settings, "intermediate_size", 0)
    size = next(model.parameters()).element_size()
    return len(document.tokens) * widths * size + 3 * 4 * len(document.positions) * settings.vocab_size


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    information = Path("/proc/meminfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
