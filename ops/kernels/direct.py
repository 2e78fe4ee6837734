"""The functions in C by which Triton's launchers launch kernels, called without the Python of the launchers.

A launcher that allocates nothing hands on what it is given, in another order and among constants. That order is learnt
once, by a copy of the launcher that only takes note. What is used of Triton is private to it (3.6 to 3.9 are alike);
where a launcher is not as known here, it is called itself.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

Values: TypeAlias = tuple[Any, ...]
"""What differs between two launches: the stream, and the addresses of operands."""

MODULE = "triton.backends.nvidia.driver"
_SCRATCH = {"global_scratch_size", "profile_scratch_size"}
_KNOWN = _SCRATCH | {
    "launch",
    "num_ctas",
    "global_scratch_align",
    "profile_scratch_align",
    "launch_cooperative_grid",
    "launch_pdl",
    "arg_annotations",
    "kernel_signature",
    "gsan_enabled",
}
"""The attributes of launchers that hand on what they are given; others may have them do more."""


@dataclass(frozen=True)
class Place:
    """In place of an argument that differs between launches: where it is among their `Values`."""

    index: int


class DirectLaunch(NamedTuple):
    """A function that launches a kernel, what picks its arguments out of `Values` and constants, and the constants."""

    launch: Callable[..., Any]
    pick: Callable[[Values], Values]
    constants: Values

    @classmethod
    def of(cls, launcher: Any, arguments: Sequence[Any], values: int) -> DirectLaunch:
        """The fastest way to call a launcher with arguments, some of which are places among so many `Values`."""
        handed = _handed_on(launcher, arguments)
        if handed is None:
            return cls(launcher, *_picking(arguments, values))
        *first, last = handed
        if not isinstance(last, tuple):
            return cls(launcher.launch, *_picking(handed, values))
        of_first, constants = _picking(first, values)
        of_last, others = _picking(last, values + len(constants))

        def pick(x: Values) -> Values:
            return *of_first(x), of_last(x)

        return cls(launcher.launch, pick, constants + others)


def _handed_on(launcher: Any, arguments: Sequence[Any]) -> Values | None:
    """What a launcher with such arguments calls its ``launch`` with; None where it may do more than that."""
    attributes = getattr(launcher, "__dict__", {})
    if type(launcher).__module__ != MODULE or not _SCRATCH | {"launch"} <= attributes.keys() <= _KNOWN:
        return None
    if any(attributes[size] for size in _SCRATCH) or attributes.get("gsan_enabled"):
        return None
    calls: list[Values] = []
    noting = copy.copy(launcher)
    noting.launch = lambda *handed: calls.append(handed)
    with suppress(Exception):  # It may compute with what is not there yet.
        noting(*arguments)
    return calls[0] if [Counter(_places(handed)) for handed in calls] == [Counter(_places(arguments))] else None


def _places(arguments: Sequence[Any]) -> Iterator[Place]:
    for x in arguments:
        if isinstance(x, Place):
            yield x
        elif isinstance(x, tuple):
            yield from _places(x)


def _picking(arguments: Sequence[Any], start: int) -> tuple[Callable[[Values], Values], Values]:
    """What picks such arguments out of values, those from `start` on being constants; the constants."""
    constants = tuple(x for x in arguments if not isinstance(x, Place))
    of_constants = iter(range(start, start + len(constants)))
    indices = [x.index if isinstance(x, Place) else next(of_constants) for x in arguments]
    if len(indices) > 1:
        return operator.itemgetter(*indices), constants
    return lambda values: tuple(values[index] for index in indices), constants
