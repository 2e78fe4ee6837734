"""A mask that looks like a tensor and is computed only if somebody looks inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ops.visibility import Visibility

_PROPERTIES = ("device", "dtype", "grad_fn", "is_cuda", "is_leaf", "layout", "ndim", "requires_grad", "shape")
_ASKING = frozenset(
    {
        *(getattr(torch.Tensor, name).__get__ for name in _PROPERTIES),
        torch.Tensor.__len__,
        torch.Tensor.contiguous,
        torch.Tensor.cpu,
        torch.Tensor.cuda,
        torch.Tensor.dim,
        torch.Tensor.is_complex,
        torch.Tensor.is_floating_point,
        torch.Tensor.numel,
        torch.Tensor.size,
        torch.Tensor.to,
        torch.is_complex,
        torch.is_floating_point,
    }
)
"""What asks about a mask, or moves it, and needs none of its elements."""
_READING = frozenset(
    {
        scaled_dot_product_attention,
        torch.Tensor.__and__,
        torch.Tensor.__eq__,
        torch.Tensor.__invert__,
        torch.Tensor.__or__,
        torch.Tensor.all,
        torch.Tensor.any,
        torch.Tensor.clone,
        torch.Tensor.float,
        torch.Tensor.logical_not,
        torch.Tensor.masked_fill,
        torch.Tensor.sum,
        torch.equal,
        torch.where,
    }
)
"""What reads the elements and returns none of their memory."""


class LazyMask(torch.Tensor):
    """A boolean mask [B, 1, Lq, Lk], of which only the terms are stored until its memory is asked for.

    transformers passes masks of 4 dimensions through to attention as they are, and some of its models, and hooks of
    users, work on them. What is known to read a mask gets its elements. Anything else may write to it or keep a view,
    so from then on the mask holds an ordinary tensor, and every operation is one on that tensor.

    Attributes:
        terms: What the mask says while it `is_lazy`.
    """

    terms: Visibility
    _held: torch.Tensor | None

    @staticmethod
    def __new__(cls, terms: Visibility, shape: Sequence[int], device: torch.device) -> LazyMask:
        with torch.inference_mode(False):
            mask: LazyMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.terms, mask._held = terms, None
        # Its memory is nowhere: what asks for it behind the back of both handlers below gets an error.
        torch._C._set_throw_on_mutable_data_ptr(mask)
        return mask

    @property
    def is_lazy(self) -> bool:
        """Whether `terms` are all that the mask says."""
        return self._held is None

    def read(self) -> torch.Tensor:
        """The elements as an ordinary tensor, which nobody may write to."""
        if self._held is not None:
            return self._held
        batch, _, queries, keys = self.shape
        mask = self.terms.as_mask(batch, queries, keys, self.device)
        return mask if mask.shape == self.shape else mask.expand(self.shape)

    def hold(self) -> torch.Tensor:
        """The ordinary tensor that the mask is from now on."""
        if self._held is None:
            with torch.inference_mode(False):
                self._held = self.read().contiguous()
        return self._held

    def _to(self, device: torch.device) -> LazyMask:
        """The same on another device."""
        padding = self.terms.key_padding
        terms = self.terms._replace(key_padding=None if padding is None else padding.to(device))
        return LazyMask(terms, self.shape, device)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch on what the masks among its arguments stand for."""
        kwargs = kwargs or {}
        if func in _ASKING and all(mask.is_lazy for mask in _masks(args, kwargs)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        reads = func in _READING and "out" not in kwargs
        return _on_elements(func, LazyMask.read if reads else LazyMask.hold, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The same for what does not ask `__torch_function__`, as vmap and collective communication do not."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_lazy and kwargs.get("dtype") in (None, torch.bool):
            return args[0]._to(kwargs.get("device", args[0].device))
        return _on_elements(func, LazyMask.hold, args, kwargs)

    def __hash__(self) -> int:
        return id(self)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyMask({self.terms}, {tuple(self.shape)})" if self.is_lazy else repr(self.hold())


def _on_elements(
    func: Callable[..., Any],
    elements: Callable[[LazyMask], torch.Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The result of a function of the masks' elements, where a mask stands for its own."""
    operands = {name: _mapped(elements, value) for name, value in kwargs.items()}
    result = func(*_mapped(elements, args), **operands)
    for mask in _masks(args, kwargs):
        if result is mask._held is not None:
            return mask
    return result


def _mapped(elements: Callable[[LazyMask], torch.Tensor], value: Any) -> Any:
    """The same with elements instead of masks; a dictionary stays itself, since `copy.deepcopy` fills one."""
    return tree_map_only(LazyMask, elements, value, is_leaf=lambda leaf: isinstance(leaf, dict))


def _masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[LazyMask]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, LazyMask)]
