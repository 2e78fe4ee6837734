"""Numbers of the host on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def uploaded(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Numbers as int32 on a device; through pinned memory, so that the host does not wait for a GPU."""
    on_host = torch.tensor(numbers, dtype=torch.int32, pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)
