"""How a model is called on prompts: with a tokenizer's mask or without, and prompts of several lengths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

SHARES = (1, 7 / 8, 3 / 4, 1 / 2)
"""Lengths of the prompts of a padded batch, to the longest."""


@dataclass(frozen=True)
class Call:
    """One way to prefill.

    Attributes:
        name: For reports.
        inputs: Keyword arguments of the model, a mapping for each time that it is called.
    """

    name: str
    inputs: tuple[dict[str, Any], ...]

    @property
    def is_dynamic(self) -> bool:
        """Whether lengths vary, so that the model is to be compiled for all of them."""
        return len(self.inputs) > 1


def plain_calls(tokens: torch.Tensor, masks: tuple[bool, ...]) -> list[Call]:
    """Calls on tokens [B, L] with the tokenizer's mask, which is all ones, and without a mask."""
    names = {True: "mask of ones", False: "no mask"}
    return [
        Call(names[masked], (prefill_inputs(tokens, torch.ones_like(tokens) if masked else None),)) for masked in masks
    ]


def padded_calls(tokens: torch.Tensor) -> list[Call]:
    """Calls on prompts that are the last `SHARES` of tokens [1, L]: one after another, and as a batch padded left."""
    length = tokens.shape[1]
    lengths = [max(1, int(length * share)) for share in SHARES]
    alone = [tokens[:, length - kept :].contiguous() for kept in lengths]
    mask = torch.stack([torch.arange(length, device=tokens.device) >= length - kept for kept in lengths]).long()
    batch = torch.where(mask.bool(), tokens, 0)
    return [
        Call("one by one", tuple(prefill_inputs(prompt, torch.ones_like(prompt)) for prompt in alone)),
        Call("padded batch", (prefill_inputs(batch, mask),)),
    ]


def prefill_inputs(tokens: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    """Arguments of a model for tokens [B, L], of which a mask [B, L] of integers shows those that are not padding."""
    given = {} if mask is None else {"attention_mask": mask}
    return {"input_ids": tokens, **given, "use_cache": True, "logits_to_keep": 1}
