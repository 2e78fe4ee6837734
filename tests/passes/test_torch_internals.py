"""The internals of torch that the passes rely on exist in this version."""

from __future__ import annotations

import pytest
import torch

from s2o_compile.passes import torch_internals


@pytest.mark.parametrize("name", sorted({*torch_internals.__all__} - {"namespaces"}))
def test_exists(name: str) -> None:
    assert callable(getattr(torch_internals, name))


def test_namespaces() -> None:
    gelu = torch.nn.functional.gelu
    assert any(getattr(namespace, "gelu", None) is gelu for namespace in torch_internals.namespaces)


def test_wrappers() -> None:
    assert torch_internals.is_wrapper(torch._dynamo.utils.numpy_method_wrapper("fill"))
    assert not torch_internals.is_wrapper(torch.nn.functional.softmax)


def test_operators() -> None:
    assert torch_internals.is_aten(torch.ops.aten.add)
    assert not torch_internals.is_aten(torch.ops.s2o.attention)
    assert torch_internals.written_arguments(torch.ops.aten.add_.Tensor) == [(0, "self")]


def test_erased_nodes() -> None:
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    assert not torch_internals.is_erased(node)
    graph.erase_node(node)
    assert torch_internals.is_erased(node)
