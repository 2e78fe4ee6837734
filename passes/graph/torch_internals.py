"""The private parts of torch that the passes use; torch 2.11 to 2.14 have all of them."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import sympy
import torch
from torch._C._functorch import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import guard_or_false
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map
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
    "attention_preferences",
    "copy_graph",
    "enter_autocast",
    "exit_autocast",
    "fake_mode",
    "flex_attention",
    "guard_or_false",
    "input_sources",
    "is_aten",
    "is_batched",
    "is_erased",
    "is_inplace_view",
    "is_plain",
    "is_true_now",
    "is_wrapper",
    "make_fx",
    "namespaces",
    "redirections",
    "storages",
    "transformer_encoder_layer",
    "tree_leaves",
    "tree_map",
    "truth",
    "unbatched",
    "version",
    "why_not_plain",
    "without_attention_patterns",
    "without_guards",
    "written_arguments",
]

flex_attention = torch.ops.higher_order.flex_attention
"""The operator that torch.nn.attention.flex_attention.flex_attention calls."""
transformer_encoder_layer = torch._transformer_encoder_layer_fwd
"""The operator that nn.TransformerEncoderLayer calls in inference."""


namespaces = (torch._C._nn, torch._functorch.predispatch)
"""Modules whose functions are called under another name."""


def fake_mode(values: Iterable[Any]) -> FakeTensorMode:
    """The mode of the fake tensors among `values`, of which there is at least one."""
    return next(value.fake_mode for value in values if isinstance(value, FakeTensor))


def without_guards(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """A context in which operations on a mode's fake tensors decide nothing about the sizes that a graph serves."""
    return contextlib.nullcontext() if mode.shape_env is None else mode.shape_env.suppress_guards()


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


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is dense, of no subclass, and in no wrapper but those of vmap."""
    tensor = unbatched(tensor)
    return (
        type(tensor) in (torch.Tensor, FakeTensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_nested
        and not is_functorch_wrapped_tensor(tensor)
        and not torch._is_functional_tensor(tensor)
    )


def why_not_plain(tensor: torch.Tensor) -> str:
    """The reason why a tensor is not known, as the end of a sentence."""
    tensor = unbatched(tensor)
    if is_functorch_wrapped_tensor(tensor):
        return "differentiated by torch.func; only what is computed outside of its transforms becomes sparse"
    if tensor.layout != torch.strided or tensor.is_nested:
        return "sparse or nested; pass a dense tensor"
    if not is_plain(tensor):
        return f"a {type(tensor).__name__}; pass a plain tensor"
    return "changed in place later in a way that cannot be followed; compute a new tensor instead"


def storages(tensor: torch.Tensor) -> set[StorageWeakRef | None]:
    """Identities of the memory that a tensor of any kind lies in; None stands for any memory, where it is not known."""
    try:
        while is_functorch_wrapped_tensor(tensor):
            tensor = get_unwrapped(tensor)
        if torch._is_functional_tensor(tensor):
            tensor = torch._from_functional_tensor(tensor)
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            return set().union(*(storages(getattr(tensor, name)) for name in names))
        return {StorageWeakRef(part.untyped_storage()) for part in _dense_parts(tensor)}
    except (RuntimeError, NotImplementedError, AttributeError, TypeError):
        return {None}


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The dense tensors that a sparse one consists of; a dense tensor itself."""
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def is_inplace_view(name: str) -> bool:
    """Whether a tensor method changes the shape of its tensor, or what it is a view of, in place."""
    operator = getattr(torch.ops.aten, name, None)
    if not isinstance(operator, OpOverloadPacket):
        return False
    return torch.Tag.inplace_view in getattr(operator, operator.overloads()[0]).tags


def version(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place, detaching not counted; None in inference mode, which does not count."""
    try:
        return tensor._version
    except RuntimeError:
        return None


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


def copy_graph(graph: Graph) -> Graph:
    """A graph with the same names, values and sources, and nodes of its own."""
    copy = deepcopy(graph)
    for node, copied in zip(graph.nodes, copy.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):
            copied._dynamo_source = node._dynamo_source
    return copy


def attention_preferences() -> dict[str, Any]:
    """All that decides which of its backends SDPA takes, as ``torch.nn.attention.sdpa_kernel`` sets it."""
    names = [name for name in dir(torch._C) if re.match("_get_.*sdp", name)]
    return {name.removeprefix("_get_"): getattr(torch._C, name)() for name in names}


def redirections() -> tuple[type[Exception], ...]:
    """The exceptions by which a backend makes Dynamo trace again, or not at all."""
    from torch._dynamo.exc import RestartAnalysis, SkipFrame

    return RestartAnalysis, SkipFrame


_attention_is_left_alone: ContextVar[bool] = ContextVar("attention_is_left_alone", default=False)


@contextlib.contextmanager
def without_attention_patterns() -> Iterator[None]:
    """Let Inductor call SDPA for nothing that only looks like attention, in what this context compiles.

    Its patterns compare neither dimensions nor the values that hide scores: softmax over queries, transposes and masks
    of any kind are taken for those of attention.
    """
    from torch._inductor.fx_passes.joint_graph import patterns

    if not hasattr(patterns.apply, "s2o_original"):
        vars(patterns)["apply"] = _with_a_choice(patterns)
    token = _attention_is_left_alone.set(True)
    try:
        yield
    finally:
        _attention_is_left_alone.reset(token)


def _with_a_choice(patterns: Any) -> Callable[[Any], int]:
    """`patterns.apply`, with all patterns or, where the context says so, without those for attention."""
    original = patterns.apply

    def apply(graph: Any) -> int:
        return (_others(patterns).apply if _attention_is_left_alone.get() else original)(graph)

    apply.s2o_original = original  # type: ignore[attr-defined]
    return apply


def _others(patterns: Any) -> Any:
    """The patterns of Inductor that are not for attention."""
    from torch._inductor.fx_passes import fuse_attention

    others = type(patterns)(patterns.pass_name, patterns.subsystem)
    for key, entries in patterns.patterns.items():
        kept = [entry for entry in entries if _pattern_module(entry) != fuse_attention.__name__]
        if kept:
            others.patterns[key] = kept
    return others


def _pattern_module(entry: Any) -> str | None:
    """The module of the function that a pattern was traced from; None for those that are written as patterns."""
    variables = inspect.getclosurevars(entry.extra_check).nonlocals if inspect.isfunction(entry.extra_check) else {}
    return getattr(variables.get("search_fn"), "__module__", None)
