"""What the passes use of torch that its documentation does not promise; torch 2.11 to 2.13 have all of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod, PythonMod

__all__ = [
    "FloorDiv",
    "HigherOrderOperator",
    "Max",
    "Min",
    "Mod",
    "OpOverload",
    "OpOverloadPacket",
    "PythonMod",
    "StorageWeakRef",
    "enter_autocast",
    "exit_autocast",
    "fake_mode",
    "flex_attention",
    "guard_or_false",
    "input_sources",
    "is_aten",
    "is_batched",
    "is_erased",
    "is_true_now",
    "is_wrapper",
    "make_fx",
    "namespaces",
    "transformer_encoder_layer",
    "tree_leaves",
    "truth",
    "unbatched",
    "written_arguments",
]

flex_attention = torch.ops.higher_order.flex_attention
"""What torch.nn.attention.flex_attention.flex_attention calls."""
transformer_encoder_layer = torch._transformer_encoder_layer_fwd
"""What nn.TransformerEncoderLayer calls in inference."""


namespaces = (torch._C._nn, torch._functorch.predispatch)
"""Where functions live that are called under another name."""


def fake_mode(values: Iterable[Any]) -> FakeTensorMode:
    """The mode of the fake tensors among `values`, of which there is at least one."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def truth(relation: sympy.Basic, tensor: torch.Tensor) -> torch.SymBool | None:
    """Whether a relation holds of the sizes in the graph that `tensor` is a fake tensor of; None where it has none."""
    environment = tensor.fake_mode.shape_env if isinstance(tensor, FakeTensor) else None
    return None if environment is None else environment.create_symboolnode(relation)


def is_true_now(truth: torch.SymBool) -> bool:
    """Whether something is true of the sizes with which a graph is traced; it is not guarded by the answer."""
    return truth.node.hint is True


def input_sources(graph: Graph) -> list[str]:
    """Where Dynamo found each input of a graph, as "L['self']._parameters['weight']"; '' where it does not say."""
    sources = (getattr(node, "_dynamo_source", None) for node in graph.find_nodes(op="placeholder"))
    return ["" if source is None else _source_name(source) for source in sources]


def _source_name(source: Any) -> str:
    """The name is a method in some releases of torch and a property in others."""
    return source.name() if callable(source.name) else source.name


def unbatched(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with the dimensions that vmap hides; the tensor itself outside of vmap."""
    while is_batched(tensor):
        tensor = get_unwrapped(tensor)
    return tensor


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether vmap hides a dimension of a tensor."""
    return bool(is_batchedtensor(tensor))


def is_aten(operator: OpOverloadPacket) -> bool:
    """Whether an operator is one of PyTorch's own."""
    return operator._qualified_op_name.startswith("aten::")


def is_erased(node: Node) -> bool:
    """Whether a node was removed from its graph."""
    return node._erased


def is_wrapper(function: Any) -> bool:
    """Whether a function is one that Dynamo puts around code of another library, such as NumPy."""
    return str(getattr(function, "__module__", None)).startswith("torch._dynamo")


def written_arguments(operator: OpOverload) -> list[tuple[int, str]]:
    """The places and names of the arguments that an operator writes to."""
    arguments = enumerate(operator._schema.arguments)
    return [(place, item.name) for place, item in arguments if item.alias_info is not None and item.alias_info.is_write]
