"""A mask that looks like a tensor and is computed only if somebody looks inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..ops.visibility import Visibility


class LazyMask(torch.Tensor):
    """A boolean mask [B, 1, Lq, Lk], of which only the terms are stored.

    transformers passes masks of 4 dimensions through to attention as they are, and some of its models work on them.
    Any operation on such a mask is done on what it stands for.

    Attributes:
        terms: What the mask says.
    """

    terms: Visibility

    @staticmethod
    def __new__(cls, terms: Visibility, shape: tuple[int, int, int, int], device: torch.device) -> LazyMask:
        mask: LazyMask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.terms = terms
        return mask

    def dense(self) -> torch.Tensor:
        """The mask as an ordinary tensor."""
        batch, _, queries, keys = self.shape
        return self.terms.as_mask(batch, queries, keys, self.device).expand(self.shape)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(LazyMask, LazyMask.dense, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyMask({self.terms}, {tuple(self.shape)})"
