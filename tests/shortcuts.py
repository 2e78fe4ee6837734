"""What torch and Triton do besides their work, left out: four fifths of the interpreter's time, a sixth of Dynamo's.

And what the interpreter does wrong, mended.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def hasten_interpreter() -> None:
    """Leave out what Triton's interpreter does again and again."""
    patch_languages_once()
    look_types_up_once()
    reduce_slice_by_slice()
    leave_overflows_uncomputed()


def patch_languages_once() -> None:
    """Let a launch exchange the functions of `triton.language` once, not at each call of a function within its kernel.

    What such calls exchange again is exchanged already, until the launch ends.
    """
    from triton import language
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang
    done: set[frozenset[str]] = set()

    @functools.cache
    def languages_of(function: Any) -> frozenset[str]:
        modules = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return frozenset(value.__name__ for value in modules if value in (language, language.core))

    class Nothing:
        """What a call within a launch has to restore."""

        def restore(self) -> None:
            pass

    def exchange_once(function: Any) -> Any:
        key = languages_of(function)
        if key in done:
            return Nothing()
        scope, is_launch = exchange(function), not done
        if not hasattr(scope, "restore"):  # Releases that never restore.
            return scope
        done.add(key)
        if is_launch:
            restore = scope.restore

            def finish() -> None:
                done.clear()
                restore()

            scope.restore = finish
        return scope

    interpreter._patch_lang = exchange_once


def look_types_up_once() -> None:
    """Remember what NumPy stores a type as, what a block's type is, and what a tensor has besides its numbers."""
    from triton import language
    from triton.runtime import interpreter

    stored_as, begin, begin_block = interpreter._get_np_dtype, language.tensor.__init__, language.block_type.__init__
    dtypes: dict[str, np.dtype[Any]] = {}
    parts: dict[str, dict[str, Any]] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def remembered_dtype(dtype: Any) -> np.dtype[Any]:
        if dtype.name not in dtypes:
            dtypes[dtype.name] = stored_as(dtype)
        return dtypes[dtype.name]

    def begin_as_the_first(tensor: Any, handle: Any, type: Any) -> None:
        known = parts.get(type.name)
        if known is None:
            begin(tensor, handle, type)
            parts[type.name] = {name: value for name, value in vars(tensor).items() if name != "handle"}
        else:
            vars(tensor).update(known, handle=handle)

    def begin_block_as_the_first(block: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in blocks:
            begin_block(block, element_ty, shape)
            blocks[key] = dict(vars(block))
        else:
            vars(block).update(blocks[key])

    interpreter._get_np_dtype = remembered_dtype
    language.tensor.__init__ = begin_as_the_first
    language.block_type.__init__ = begin_block_as_the_first


def reduce_slice_by_slice() -> None:
    """Let reductions by a kernel's own function combine whole slices in the order of their elements, not each alone."""
    from triton.runtime import interpreter

    one_by_one: Callable[[Any, Any], Any] = interpreter.ReduceOps.generic_reduce

    def reduce(operation: Any, tensors: Any) -> Any:
        axis = operation.axis
        if axis is None or operation.keep_dims or len(tensors) > 1:
            return one_by_one(operation, tensors)
        (tensor,) = tensors
        first, *others = (operation.to_tensor(x, tensor.dtype) for x in np.moveaxis(tensor.handle.data, axis, 0))
        return [functools.reduce(operation.combine_fn.fn, others, first)]

    interpreter.ReduceOps.generic_reduce = reduce


def leave_overflows_uncomputed() -> None:
    """Compute no sum of integers again in int64 for an assertion, which is made for debugging alone."""
    from triton.runtime.interpreter import interpreter_builder as builder

    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def round_to_float8_as_gpus_do() -> None:
    """Let the interpreter round to the nearest float8, and what is too large to the largest.

    Triton's own, as of 3.9, is off just below powers of 2, cuts small numbers off, and makes large ones small or NaN.
    """
    from triton import language
    from triton.runtime import interpreter

    convert: Callable[..., np.ndarray] = interpreter._convert_float
    stored_as = {language.float16: np.float16, language.float32: np.float32}
    largest = torch.finfo(torch.float8_e4m3fn).max

    def converted(numbers: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if target != language.float8e4nv or source not in stored_as:
            return convert(numbers, source, target, rounding)
        exact = torch.from_numpy(np.ascontiguousarray(numbers).view(stored_as[source]).astype(np.float32))
        return exact.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    interpreter._convert_float = converted


def leave_guards_unmeasured() -> None:
    """Let Dynamo not measure how long each guard takes, for a log that nobody reads; it empties the CPU's caches."""
    from torch._dynamo import guards

    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *arguments: 0.0
