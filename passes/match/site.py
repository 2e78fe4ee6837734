"""One attention of a graph as it was found, in the terms of SDPA."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from sympy.logic.boolalg import Boolean
from torch.fx import Node

from ..graph.axes import Step
from ..mask.mask_tensors import MaskTensor
from .operator_inputs import Input
from .walk import Factor


@dataclass(frozen=True)
class AttentionSite:
    """One attention, in the terms of ``scaled_dot_product_attention``.

    Attributes:
        node: The node whose value is the attention's output.
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        masks: What masks the scores, all together.
        mask_mod: Where a query may see a key, as a predicate over `AXES` in place of masks; None if they are tensors.
        is_causal: Whether query i sees only the keys up to i, counted from the top left.
        scale: The factors of the logits, or None for D ** -0.5.
        softcap: The factors of c in ``c * tanh(logits / c)``; None without a soft-cap.
        sinks: [Hq], a logit for each head beside those of the keys; None without.
        enable_gqa: Whether fewer key heads than query heads are allowed.
        dropout_p: The dropout probability, or a node that holds it.
        output: The tensor methods that turn [B, Hq, Lq, Dv] into the layout of `node`.
        scores: The nodes that hold scores or probabilities; nothing else may use them.
        passed: Nodes that may be left without use.
        obstacle: Why the site cannot become the operator, in one sentence; empty if nothing is known.
    """

    node: Node
    query: Input
    key: Input
    value: Input
    masks: tuple[MaskTensor, ...] = ()
    mask_mod: Boolean | None = None
    is_causal: bool | Node = False
    scale: tuple[Factor, ...] | None = None
    softcap: tuple[Factor, ...] | None = None
    sinks: Input | None = None
    enable_gqa: bool | Node = False
    dropout_p: float | Node = 0.0
    output: tuple[Step, ...] = ()
    scores: frozenset[Node] = frozenset()
    passed: frozenset[Node] = frozenset()
    obstacle: str = ""

    @property
    def query_and_key(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Fake tensors of the query and of the key, where they are known."""
        query, key = self.query.tensor, self.key.tensor
        assert query is not None and key is not None
        return query, key
