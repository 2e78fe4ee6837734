"""The soft cap of logits, and the online softmax as the specification spells it out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def soft_cap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """`softcap` * tanh(logits / `softcap`), as in Gemma 2 (arXiv 2408.00118); the logits themselves where it is 0."""
    return (logits / softcap).tanh_().mul_(softcap) if softcap else logits


@dataclass
class OnlineSoftmax:
    """Softmax-weighted sums of values, accumulated over blocks of keys (Milakov and Gimelshein, 2018).

    `maximum` and `mass` are [..., R], `total` is [..., R, Dv].
    """

    maximum: torch.Tensor
    mass: torch.Tensor
    total: torch.Tensor

    @classmethod
    def empty(cls, query: torch.Tensor, width: int) -> OnlineSoftmax:
        """The sum over no keys, for query rows [..., R, D] and values of `width` channels."""
        shape = query.shape[:-1]
        return cls(query.new_full(shape, -math.inf), query.new_zeros(shape), query.new_zeros(*shape, width))

    def add(self, logits: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Add keys with logits [..., R, N] and values [..., N, Dv]; return the mass gained over the mass before."""
        if not logits.shape[-1]:
            return torch.zeros_like(self.mass)
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        origin = maximum.masked_fill(maximum == -math.inf, 0)
        weights = (logits - origin[..., None]).exp_()
        decay = (self.maximum - origin).exp_()
        kept, gained = self.mass * decay, weights.sum(-1)
        self.total = self.total * decay[..., None] + weights @ values
        self.maximum, self.mass = maximum, kept + gained
        return gained / kept

    def output(self) -> torch.Tensor:
        """The weighted mean of the values [..., R, Dv]; zeros where no key was added."""
        return self.total / self.mass.masked_fill(self.mass == 0, 1)[..., None]

    def lse(self) -> torch.Tensor:
        """The log of the mass [..., R]; -inf where no key was added."""
        return self.maximum + self.mass.log()
