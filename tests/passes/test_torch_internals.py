"""The internals of torch that the passes rely on exist in this version."""

from __future__ import annotations

import contextvars

import pytest
import sympy
import torch

from s2o_compile.passes.graph import torch_internals


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


def test_copies_of_graphs() -> None:
    sources: list[list[str]] = []

    def backend(module: torch.fx.GraphModule, inputs: object) -> object:
        copy = torch_internals.copy_graph(module.graph)
        sources.extend(map(torch_internals.input_sources, (module.graph, copy)))
        assert [node.name for node in copy.nodes] == [node.name for node in module.graph.nodes]
        assert not set(copy.nodes) & set(module.graph.nodes)
        return module.forward

    torch.compile(torch.nn.Sequential(torch.nn.Linear(2, 2)), backend=backend)(torch.ones(1, 2))
    assert sources[0] == sources[1] and all(sources[0])


def test_preferences_of_sdpa() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    plain = torch_internals.attention_preferences()
    assert {f"{name}_sdp_enabled" for name in ("flash", "mem_efficient", "math", "cudnn")} < set(plain)
    assert {"sdp_priority_order", "math_sdp_allow_fp16_bf16_reduction"} < set(plain)
    orders = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    seen = [plain]
    for order in orders:
        with sdpa_kernel(order, set_priority=True):
            seen.append(torch_internals.attention_preferences())
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(not plain["math_sdp_allow_fp16_bf16_reduction"])
    seen.append(torch_internals.attention_preferences())
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(plain["math_sdp_allow_fp16_bf16_reduction"])
    assert all(one != other for place, one in enumerate(seen) for other in seen[:place])
    assert torch_internals.attention_preferences() == plain


def test_patterns_for_attention() -> None:
    """They are there, those of Inductor's next to them stay, and only one context is without them."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.utils import counters
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes, patterns

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v).permute(1, 0, 2, 3).permute(1, 0, 2, 3)

    def fused() -> tuple[int, int]:
        counters.clear()
        table, args = select_decomp_table(), torch.randn(3, 2, 4, 8, 8)
        backend = aot_autograd(fw_compiler=lambda graph, _: joint_graph_passes(graph).forward, decompositions=table)
        with torch.no_grad():
            torch.testing.assert_close(torch.compile(lambda *x: attend(*x), backend=backend)(*args), attend(*args))
        return counters["inductor"]["fuse_attention"], counters["inductor"]["pattern_matcher_count"]

    assert fused()[0] == 1
    with torch_internals.without_attention_patterns():
        without, others = fused()
        assert without == 0 and others > 0
        assert contextvars.Context().run(fused)[0] == 1, "another thread's compilation has them"
    assert fused()[0] == 1
    assert len(torch_internals._others(patterns).patterns) < len(patterns.patterns)


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
