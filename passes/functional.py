"""Turns masks that are filled in place into masks that are computed anew, which can be read."""

from __future__ import annotations

from torch.fx import Graph, Node

from .mutation import storage, writes
from .values import fake_tensor

_FILLS = {"masked_fill_", "tril_", "triu_"}
"""Methods whose result has the dtype of the tensor that they change, in place or not."""


def fill_anew(graph: Graph) -> None:
    """Replace fills in place of tensors that the graph makes and that have no views; the graph computes the same."""
    for written, writers in writes(graph).items():
        base, *others = [
            node for node in graph.nodes if (tensor := fake_tensor(node)) is not None and storage(tensor) == written
        ]
        is_filled = all(writer.op == "call_method" and writer.target in _FILLS for writer in writers)
        if base.op in ("call_function", "call_method") and others == writers and is_filled:
            _fill_anew(base, writers)


def _fill_anew(base: Node, writers: list[Node]) -> None:
    current = base
    for writer in writers:
        writer.update_arg(0, current)
        writer.target = str(writer.target).removesuffix("_")
        for before in (base, *writers):
            for user in [user for user in before.users if writer < user]:
                user.replace_input_with(before, writer)
        current = writer
