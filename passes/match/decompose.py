"""Replaces calls that hide attention, as those of nn.MultiheadAttention, by the operations that they consist of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn import functional as F

from ..graph.autocast import autocast_at
from ..graph.node_values import AS_COMPUTED, fake_tensor, held, needs_gradients, objects
from ..graph.torch_internals import fake_mode, is_batched, make_fx, transformer_encoder_layer


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """The computation of nn.TransformerEncoderLayer in inference, with the batch as the first dimension."""

    def attend(x: Tensor) -> Tensor:
        qkv = F.linear(x, qkv_weight, qkv_bias).unflatten(-1, (3, num_heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        allowed = None if mask is None else _allowed(mask, mask_type)
        output = F.scaled_dot_product_attention(query, key, value, allowed)
        return F.linear(output.transpose(1, 2).flatten(2), proj_weight, proj_bias)

    def feed(x: Tensor) -> Tensor:
        hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

    def norm_1(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def norm_2(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = attend(norm_1(src)) + src
        return feed(norm_2(x)) + x
    x = norm_1(attend(src) + src)
    return norm_2(feed(x) + x)


def _allowed(mask: Tensor, mask_type: int | None) -> Tensor:
    """Where a query may see a key; the native operators hide it where a mask is not zero, of whatever dtype."""
    hidden = mask.bool()
    padding = 1
    return ~(hidden[:, None, None] if mask_type == padding else hidden)


_BODIES: Mapping[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    transformer_encoder_layer: _encoder_layer,
}
"""The calls that are decomposed, and functions that compute the same of smaller ones."""


@dataclass(frozen=True)
class Decomposition:
    """A call that was taken out of a graph, and the nodes that took its place.

    Attributes:
        node: The call, without arguments and use, still in the graph.
        nodes: The nodes that compute what it did, in order.
    """

    node: Node
    nodes: tuple[Node, ...]
    _args: tuple[Any, ...]
    _kwargs: dict[str, Any]
    _outputs: Mapping[Node, Node]

    def keep(self) -> None:
        """Remove the call."""
        for output in self._outputs:
            output.graph.erase_node(output)
        if self.node not in self._outputs:
            self.node.graph.erase_node(self.node)

    def undo(self) -> None:
        """Put the call back."""
        self.node.args, self.node.kwargs = self._args, self._kwargs
        for output, replacement in self._outputs.items():
            replacement.replace_all_uses_with(output, delete_user_cb=lambda user: user not in self.nodes)
        for node in reversed(self.nodes):
            node.graph.erase_node(node)


def decompose(node: Node) -> Decomposition | None:
    """Replace a call that may hide attention by what it consists of; None where it is another or not known."""
    body = _BODIES.get(node.target) if node.op == "call_function" else None
    if body is None:
        return None
    outputs = _outputs(node)
    if not outputs or not all(map(_is_readable, (*outputs, *node.all_input_nodes))):
        return None
    try:
        traced = _traced(node, body, outputs)
    except (RuntimeError, ValueError):  # The shapes that are known are not those that the call has.
        return None
    copies: dict[Node, Node] = dict(zip(traced.find_nodes(op="placeholder"), node.all_input_nodes, strict=True))
    inputs = set(copies)
    with node.graph.inserting_before(node):
        results: Any = node.graph.graph_copy(traced, copies)
    made = {source: copy for source, copy in copies.items() if source not in inputs}
    needed = any(map(needs_gradients, outputs))
    for source, copy in made.items():
        copy.meta = dict(node.meta, example_value=_marked(source.meta["val"], needed))
        copy.meta.pop(AS_COMPUTED, None)
    replaced = dict(zip(outputs, results, strict=True))
    decomposition = Decomposition(node, tuple(made.values()), node.args, node.kwargs, replaced)
    node.args, node.kwargs = (), {}
    for output, result in replaced.items():
        output.replace_all_uses_with(result)
    return decomposition


def _outputs(node: Node) -> list[Node]:
    """The nodes that hold the tensors of a call's result."""
    return [node] if isinstance(held(node), Tensor) else list(node.users)


def _is_readable(node: Node) -> bool:
    """Whether a node holds a number, or a tensor that is known and can be traced with outside of vmap."""
    tensor = fake_tensor(node)
    return not objects(node) if tensor is None else not is_batched(tensor)


def _marked(value: Any, needed: bool) -> Any:
    """A traced value, which tracing detached, as one that needs gradients or not."""
    is_differentiable = isinstance(value, Tensor) and value.is_floating_point()
    return value.requires_grad_(needed) if is_differentiable else value


def _traced(node: Node, body: Callable[..., Any], outputs: list[Node]) -> Graph:
    """A graph that computes the outputs of a call from its inputs."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> tuple[Any, ...]:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = map_arg((node.args, node.kwargs), given.__getitem__)
        result = body(*args, **kwargs)
        return tuple(result if output is node else operator.getitem(result, output.args[1]) for output in outputs)

    values = list(map(held, inputs))
    with fake_mode(values), autocast_at(node):
        traced = make_fx(call, pre_dispatch=True)(*values)
    traced.graph.eliminate_dead_code()
    return traced.graph
