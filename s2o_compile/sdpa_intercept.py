"""The calls of scaled dot product attention that a model makes, handed over one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_POSITIONAL = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@dataclass(frozen=True)
class SdpaInputs:
    """One call.

    Attributes:
        index: How many calls came before it: the layer, where a model attends once a layer.
        query: [B, Hq, Lq, D], as attention sees it.
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        options: The other arguments, as keywords.
    """

    index: int
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    options: dict[str, Any]

    @property
    def is_causal(self) -> bool:
        """Whether the causal mask is on."""
        return bool(self.options.get("is_causal", False))

    @property
    def scale(self) -> float:
        """Factor of the logits."""
        scale = self.options.get("scale")
        return self.query.shape[-1] ** -0.5 if scale is None else float(scale)

    @property
    def is_plain(self) -> bool:
        """Whether there is neither a mask tensor nor dropout, as in a prefill of one document."""
        return self.options.get("attn_mask") is None and not self.options.get("dropout_p")

    def dense(self) -> torch.Tensor:
        """What the call would have returned."""
        return scaled_dot_product_attention(self.query, self.key, self.value, **self.options)


class SdpaIntercept(TorchFunctionMode):
    """Inside ``with``, `handle` gets every call of SDPA and gives its output."""

    def __init__(self, handle: Callable[[SdpaInputs], torch.Tensor]) -> None:
        super().__init__()
        self.handle, self.count = handle, 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Hand over calls of SDPA and let all others through."""
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        options = dict(zip(_POSITIONAL, args, strict=False)) | (kwargs or {})
        query, key, value = (options.pop(name) for name in _POSITIONAL[:3])
        call = SdpaInputs(self.count, query, key, value, options)
        self.count += 1
        return self.handle(call)
