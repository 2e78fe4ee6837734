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


def test_sources_of_inputs() -> None:
    found: list[str] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        found.extend(torch_internals.input_sources(module.graph))
        return module.forward

    torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), backend=backend)(torch.ones(1, 2))
    assert any(source.endswith("._modules['0']._parameters['weight']") for source in found)
    assert torch_internals.input_sources(torch.fx.symbolic_trace(torch.nn.ReLU()).graph) == [""]


def test_kinds_of_tensors() -> None:
    seen: list[bool] = []

    def see(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.is_plain(x))
        assert torch_internals.storages(x) == torch_internals.storages(plain)
        return x.sum()

    plain = torch.ones(2, 2)
    torch.func.vmap(see)(plain)
    torch.func.grad(see)(plain)
    assert seen == [True, False]
    assert torch_internals.is_plain(plain)
    assert torch_internals.storages(plain.view(4)) == torch_internals.storages(plain)
    for other in (plain.to_sparse(), plain.to_sparse_csr(), torch.nested.as_nested_tensor([plain]), plain.to_mkldnn()):
        assert not torch_internals.is_plain(other)
        assert torch_internals.storages(other)
        assert torch_internals.why_not_plain(other).startswith("sparse or nested")


def test_changes_of_shape() -> None:
    names = ["unsqueeze_", "squeeze_", "transpose_", "t_", "swapdims_", "as_strided_", "detach_", "set_", "resize_"]
    assert all(map(torch_internals.is_inplace_view, names))
    assert not any(map(torch_internals.is_inplace_view, ["add_", "unsqueeze", "copy_", "no_operator"]))


def test_versions() -> None:
    x = torch.ones(2)
    assert torch_internals.version(x) == 0
    assert torch_internals.version(x.unsqueeze_(0)) == 1
    with torch.inference_mode():
        assert torch_internals.version(torch.ones(2)) is None
