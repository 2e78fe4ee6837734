"""What the operators do with process groups: all that they use of ``torch.distributed``, which they import late.

Operators know groups by their names, which are text, so that graphs can hold them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .layout import LAYOUTS, Block, Sharding
from .upload import uploaded

_agreed: dict[str, tuple[int, ...]] = {}
"""What the ranks of a group had in common when they were last asked, by the group's name."""


def sharding_of(mesh: Any, layout: str) -> Sharding:
    """The sharding of a sequence over the ranks of a mesh of one dimension, or of a process group.

    Raises:
        TypeError: `mesh` is neither.
        ValueError: The mesh has several dimensions, or the layout is unknown.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be {' or '.join(map(repr, LAYOUTS))}, not {layout!r}")
    from torch import distributed

    if isinstance(mesh, distributed.ProcessGroup):
        return Sharding(mesh.group_name, layout)
    if not isinstance(mesh, distributed.DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh or a ProcessGroup, not {mesh!r}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, over which the sequence is sharded, not {mesh.ndim}: take it by name, as "
            'in mesh["cp"]'
        )
    return Sharding(mesh.get_group().group_name, layout)


def group_of(name: str) -> Any:
    """The process group of a name.

    Raises:
        ValueError: There is none in this process.
    """
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"group must be the name of a process group of this process, not {name!r}") from error


class Gathering(NamedTuple):
    """Rows of all ranks [ranks * n, ...], by rank, which are there for what follows `wait` on the current stream."""

    rows: torch.Tensor
    wait: Callable[[], Any]


def start_gathering(x: torch.Tensor, group: Any) -> Gathering:
    """Begin to gather tensors [n, ...] of one shape."""
    from torch import distributed

    # The one is called by the other's name from torch 2.13 on.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    x = x.contiguous()
    gathered = x.new_empty(group.size() * len(x), *x.shape[1:])
    if not x.numel():
        return Gathering(gathered, lambda: None)
    return Gathering(gathered, gather(gathered, x, group=group, async_op=True).wait)


def start_sampling(x: torch.Tensor, positions: torch.Tensor, blocks: Sequence[Block], group: Any) -> Gathering:
    """Begin to gather the rows at some `positions` [n] of a sequence, of whose rows [..., L, D] each rank has blocks.

    They are [..., n, D], to the bit: a sum over ranks, of which all but one give zeros.
    """
    from torch import distributed

    found = x.new_zeros(*x.shape[:-2], len(positions), x.shape[-1])
    for row, position, length in blocks:
        if length:
            place = positions - position
            nearest = place.clamp(0, length - 1)
            found += torch.where((place == nearest)[:, None], x.index_select(-2, nearest + row), 0)
    if not found.numel():
        return Gathering(found, lambda: None)
    return Gathering(found, distributed.all_reduce(found, group=group, async_op=True).wait)


def check_alike(numbers: Mapping[str, int], advice: Mapping[str, str], group: Any, device: torch.device) -> None:
    """Check that numbers are the same on all ranks of a group, before tensors are sent whose sizes they are.

    All ranks ask at once. On a GPU, a rank whose own numbers are those of its last call does not wait for the answer:
    a difference then ends the device's work with an assertion. `advice` says of some numbers what to do about it.

    Raises:
        ValueError: They are not; all ranks raise this, but for those of which the above is said.
    """
    own = tuple(numbers.values())
    gathered, wait = start_gathering(uploaded(own, device)[None], group)
    wait()
    if device.type == "cuda" and _agreed.get(group.group_name) == own:
        if not torch.cuda.is_current_stream_capturing():
            torch._assert_async((gathered == gathered[:1]).all(), "the ranks of a group hold tensors of other shapes")
        return
    rows = gathered.tolist()
    for name, *values in zip(numbers, *rows, strict=True):
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found = f"not {values[0]} on rank 0 and {values[other]} on rank {other}"
            what_to_do = f": {advice[name]}" if name in advice else ""
            raise ValueError(f"{name} must be the same on all ranks of a group, {found}{what_to_do}")
    _agreed[group.group_name] = own
