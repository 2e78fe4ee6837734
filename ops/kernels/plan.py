"""Plans: the launches of a computation, recorded once for tensors of one layout and repeated for others of the same.

A computation is a function of tensors that only allocates, takes views and launches kernels (`launch`). It is recorded
on tensors without memory, of which each allocation becomes a place in one workspace and each operand an offset from one
of the tensors; everything else that a launch takes is a constant of the plan. To run a plan is to allocate the
workspace, to add addresses to offsets, and to launch: the host takes a few microseconds a kernel. Before it first runs,
its kernels are compiled together.

What a kernel is compiled for (Triton specialises it for the alignment of pointers, and for some integers that are 1 or
multiples of 16: `variants`) follows from what a plan is found by: the integers are constants of the plan, and the
alignment is part of a `Layout`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.runtime import driver

from ..geometry import round_up
from .compile import compile_ahead
from .direct import DirectLaunch, Place, Values
from .launch import Grid, is_launched_at_once, launching

Tensors: TypeAlias = Sequence[Any]
"""Tensors, and None for those that a call lacks."""
Computation: TypeAlias = Callable[..., None]
"""A function of `Tensors`, some of which it fills, and of constants."""

ALIGNMENT = 256
"""Bytes to multiples of which the workspace and each allocation in it are aligned."""
_TRITONS_ALIGNMENT = 16
_HAS_BINARIES = torch.version.hip is None and not knobs.runtime.interpret
"""Whether kernels are binaries of CUDA: Triton decides as it reads them."""
_PLANS = 1024
"""Plans that are kept; a call of another layout is recorded anew, in about two milliseconds."""


Layout: TypeAlias = tuple[torch.Size, tuple[int, ...], torch.dtype, int]
"""What a plan depends on of a tensor: its shape, strides, dtype, and its address past a multiple of what Triton asks
about."""


def layout_of(x: torch.Tensor) -> Layout:
    """The layout of a tensor."""
    return x.shape, x.stride(), x.dtype, x.data_ptr() % _TRITONS_ALIGNMENT


class Late(NamedTuple):
    """Which of the `Tensors` may still be filled by others, and what lets the steps that follow wait for that."""

    place: int
    arrive: Callable[[], Any]


def planned(
    compute: Computation, tensors: Tensors, device: torch.device, *constants: Hashable, late: Late | None = None
) -> None:
    """``compute(tensors, device, *constants)``, by a plan where it has one.

    It has none where it does more than allocate, take views and launch kernels, and where a compiler watches.

    Args:
        compute: The computation.
        tensors: What it reads and what it fills; none of them overlap where it writes.
        device: Where they are.
        constants: Everything else that it depends on.
        late: What is waited for where it is first read, if by a plan; None for nothing.
    """
    plan = None
    if is_launched_at_once():
        layouts = tuple([None if x is None else layout_of(x) for x in tensors])
        plan = plan_of(compute, layouts, device, constants)
    if plan is not None:
        plan.run(tensors, late)
        return
    if late is not None:
        late.arrive()
    compute(tensors, device, *constants)


@functools.lru_cache(maxsize=_PLANS)
def plan_of(
    compute: Computation, layouts: tuple[Layout | None, ...], device: torch.device, constants: tuple[Hashable, ...]
) -> Plan | None:
    """The plan of a computation on tensors with these layouts; None where it has none."""
    tensors = [
        None if layout is None else torch.empty_strided(*layout[:2], dtype=layout[2], device="meta")
        for layout in layouts
    ]
    recorder = Recorder(tensors)
    try:
        with recorder, launching(recorder.record):
            compute(tensors, device, *constants)
    except NotPlannable:
        return None
    return Plan(device, recorder.size, [place[:2] for place in recorder.operands], recorder.steps)


class NotPlannable(Exception):
    """A computation does something that no step of a plan repeats."""


class Operand(NamedTuple):
    """A tensor that steps take: elements from `offset` bytes past the start of one of the tensors, or workspace.

    `number` is its place among the operands of the plan.
    """

    base: int
    offset: int
    dtype: torch.dtype
    number: int

    def of(self, bases: Tensors) -> torch.Tensor:
        """Its first element."""
        base = bases[self.base]
        if base.dtype == self.dtype:
            return base.as_strided((1,), (1,), base.storage_offset() + self.offset // base.itemsize)
        return base[self.offset : self.offset + self.dtype.itemsize].view(self.dtype)


@dataclass
class Zeroing:
    """A step that sets bytes of the workspace to zero."""

    offset: int
    size: int

    def run(self, bases: Tensors, values: Values) -> None:
        """Take the step."""
        bases[-1][self.offset : self.offset + self.size].zero_()


@dataclass
class Launch:
    """A step that launches a kernel.

    Attributes:
        kernel: The function that Triton compiles.
        grid: Programs along the three axes.
        arguments: By parameter, in their order; zeros for `operands`.
        operands: The tensors among the arguments, and their places.
        options: Triton's, as the number of warps.
        kept: The kernel that the first launch without hooks was compiled to, which is loaded as long as this is kept,
            and how it is launched on `Values`.
    """

    kernel: Any
    grid: Grid
    arguments: list[Any]
    operands: list[tuple[int, Operand]]
    options: dict[str, Any]
    kept: tuple[Any, DirectLaunch] | None = field(default=None, init=False)

    def run(self, bases: Tensors, values: Values) -> None:
        """Take the step on a stream; None launches as Triton does, which looks for the kernel each time."""
        is_direct = values[0] is not None
        if self.kept is not None and is_direct:
            launch, pick, constants = self.kept[1]
            launch(*pick(values + constants))
            return
        compiled = self.kernel[self.grid](*self._arguments_on(bases), **self.options)
        if compiled is not None and is_direct:  # Under a hook it may be a profiler's own kernel.
            self.kept = compiled, DirectLaunch.of(compiled.run, self._arguments_of(compiled), len(values))

    def _arguments_of(self, compiled: Any) -> list[Any]:
        """What Triton's launcher takes, with the places among `Values` of what differs between launches."""
        arguments = self.arguments.copy()
        for place, operand in self.operands:
            arguments[place] = Place(1 + operand.number)
        return [*self.grid, Place(0), compiled.function, compiled.packed_metadata, None, None, None, *arguments]

    def compile(self, bases: Tensors) -> None:
        """Have Triton compile the kernel for what `run` launches it on, without a launch."""
        self.kernel.run(*self._arguments_on(bases), grid=self.grid, warmup=True, **self.options)

    def _arguments_on(self, bases: Tensors) -> list[Any]:
        arguments = self.arguments.copy()
        for place, operand in self.operands:
            arguments[place] = operand.of(bases)
        return arguments


@dataclass
class Plan:
    """The steps of a computation, the bytes of workspace that they take, and where their operands are.

    `places` are the base and the offset of each, by its number.
    """

    device: torch.device
    size: int
    places: list[tuple[int, int]]
    steps: list[Zeroing | Launch]
    is_compiled: bool = field(default=False, init=False)

    def run(self, tensors: Tensors, late: Late | None = None) -> None:
        """Take all steps, on tensors of the layouts that the plan was recorded for, one of which may be late."""
        before = 0 if late is None else self.steps_without(late.place)
        with _on(self.device):
            workspace = torch.empty(self.size + ALIGNMENT, dtype=torch.uint8, device=self.device)
            if (misaligned := workspace.data_ptr() % ALIGNMENT) != 0:
                workspace = workspace[ALIGNMENT - misaligned :]
            bases = (*tensors, workspace)
            addresses = [0 if x is None else x.data_ptr() for x in bases]
            stream = _stream(self.device)
            if stream is not None and not self.is_compiled:
                launches = [step for step in self.steps if isinstance(step, Launch)]
                compile_ahead([functools.partial(step.compile, bases) for step in launches])
                self.is_compiled = True
            values = stream, *[addresses[base] + offset for base, offset in self.places]
            for step in self.steps[:before]:
                step.run(bases, values)
            if late is not None:
                late.arrive()
            for step in self.steps[before:]:
                step.run(bases, values)

    def steps_without(self, place: int) -> int:
        """How many steps come before the first that reads or writes the tensor at a place."""
        launches = ((number, step) for number, step in enumerate(self.steps) if isinstance(step, Launch))
        reads = (number for number, step in launches if any(of.base == place for _, of in step.operands))
        return next(reads, len(self.steps))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which Triton launches on a device, as it does on the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int | None:
    """The current stream, for kernels that were compiled before; None where Triton has to launch them itself.

    That is where its hooks watch launches, as those of profilers, and where kernels are no binaries of CUDA.
    """
    if device.type != "cuda" or not _HAS_BINARIES or _has_hooks():
        return None
    return driver.active.get_current_stream(device.index)


def _has_hooks() -> bool:
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


class Recorder(TorchDispatchMode):
    """Records what a computation launches on tensors without memory, and where its allocations go in the workspace.

    An allocation takes the first gap between those that are still in use, as it does in PyTorch's allocator.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.steps: list[Zeroing | Launch] = []
        self.operands: dict[tuple[int, int, torch.dtype], Operand] = {}
        self.size = 0
        self._workspace = len(tensors)
        self._bases = {_storage(x): (place, x.dtype) for place, x in enumerate(tensors) if x is not None}
        self._used: dict[StorageWeakRef, range] = {}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Let through what allocates or takes a view, and record what sets to zero.

        Raises:
            NotPlannable: It computes.
        """
        if operation is torch.ops.aten.zero_.default:
            (x,) = arguments
            self.steps.append(Zeroing(self._operand(x).offset, x.numel() * x.itemsize))
            return x
        result = operation(*arguments, **(named or {}))
        if operation in _ALLOCATIONS:
            self._allocate(result)
        elif not operation.is_view or _storage(result) != _storage(arguments[0]):
            raise NotPlannable(operation)
        return result

    def record(self, kernel: Any, grid: Grid, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Record a launch."""
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        ordered = [values.pop(name) for name in kernel.arg_names]
        operands = [(place, self._operand(x)) for place, x in enumerate(ordered) if isinstance(x, torch.Tensor)]
        constants = [0 if isinstance(x, torch.Tensor) else x for x in ordered]
        self.steps.append(Launch(kernel, (*grid, 1, 1)[:3], constants, operands, values))

    def _allocate(self, x: torch.Tensor) -> None:
        used, size, start = self._in_use(), round_up(x.numel() * x.itemsize, ALIGNMENT), 0
        for other in sorted(used.values(), key=lambda place: place.start):
            if start + size <= other.start:
                break
            start = max(start, other.stop)
        used[StorageWeakRef(x.untyped_storage())] = range(start, start + size)
        self.size = max(self.size, start + size)

    def _in_use(self) -> dict[StorageWeakRef, range]:
        for storage in [storage for storage in self._used if storage.expired()]:
            del self._used[storage]
        return self._used

    def _operand(self, x: torch.Tensor) -> Operand:
        offset, storage = int(x.storage_offset()) * x.itemsize, _storage(x)
        if storage in self._bases:
            place, dtype = self._bases[storage]
            if x.dtype != dtype:
                raise NotPlannable(x.dtype)
            return self._numbered(place, offset, dtype)
        start = next(place.start for ref, place in self._in_use().items() if ref.cdata == storage)
        return self._numbered(self._workspace, start + offset, x.dtype)

    def _numbered(self, base: int, offset: int, dtype: torch.dtype) -> Operand:
        return self.operands.setdefault((base, offset, dtype), Operand(base, offset, dtype, len(self.operands)))


_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.new_empty.default,
}


def _storage(x: torch.Tensor) -> int:
    """What tells the storage of a tensor from all others that exist."""
    return x.untyped_storage()._cdata
