"""The internals of torch that the passes rely on exist in this version."""

from __future__ import annotations

import pytest
import sympy
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


def test_truth_of_relations_between_sizes() -> None:
    answers: list[tuple[bool, bool]] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        values = [node.meta["example_value"] for node in module.graph.find_nodes(op="placeholder")]
        tensor = next(value for value in values if isinstance(value, torch.Tensor))
        rows, columns = (size.node.expr for size in tensor.shape)
        for relation in (rows >= columns, columns > rows):
            truth = torch_internals.truth(relation, tensor)
            assert truth is not None
            answers.append((torch_internals.is_true_now(truth), torch_internals.guard_or_false(truth)))
        return module.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend, dynamic=True)
    for shape in ((7, 5), (9, 3), (3, 9)):
        compiled(torch.ones(shape))
    assert answers == [(True, True), (False, False), (False, False), (True, True)]
    assert torch_internals.truth(sympy.true, torch.ones(1)) is None
