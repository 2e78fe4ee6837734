"""The names of operations, whatever their spelling: as a function, a method, an operator of Python or an overload."""

from __future__ import annotations

import inspect
import operator

import torch
from torch.fx import Node

from .torch_internals import OpOverload, OpOverloadPacket, is_aten, namespaces

_MODULES = (operator, torch, torch.nn.functional, torch.special, *namespaces)
_MAGIC = {name for name in vars(operator) if name.startswith("__") and inspect.isbuiltin(getattr(operator, name))}
_ARITHMETIC = ("add", "sub", "mul", "multiply", "div", "divide", "true_divide", "subtract", "masked_fill", "nan_to_num")
_LOGIC = ("tril", "triu", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not")
_IN_PLACE = {f"{name}_": name for name in (*_ARITHMETIC, *_LOGIC)} | {
    "iand": "and_", "ior": "or_", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv",
}  # fmt: skip


def operation_name(node: Node) -> str | None:
    """The name of a method, or of a function of torch, as it is spelled; None for anything else.

    A method as ``__eq__`` has the name of its operator, ``eq``.
    """
    if node.op == "call_method":
        method = str(node.target)
        return getattr(operator, method).__name__ if method in _MAGIC else method
    if node.op != "call_function":
        return None
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
        return packet.__name__ if is_aten(packet) else None
    name = getattr(node.target, "__name__", None)
    if not isinstance(name, str):
        return None
    name = name.removeprefix("special_")
    known = any(getattr(module, name, None) is node.target for module in _MODULES)
    return name if known or node.target is getattr else None


def out_of_place(name: str) -> str:
    """The name of the operation whose result an in-place one stores; other names as they are."""
    return _IN_PLACE.get(name, name)
