"""The backend under torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.nn.functional import scaled_dot_product_attention as sdpa

import s2o_compile
from s2o_compile import S2OBackend, S2OConfig, s2o

from ..passes.capture import EXACT, inputs
from ..passes.models import tiny, tokens


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q, k, v, is_causal=True)


class Counting(S2OBackend):
    """The backend, counting its graphs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        counts.append(1)
        return super().__call__(*args, **kwargs)


counts: list[int] = []


@pytest.fixture
def sparse_calls(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The thresholds of all sparse calls that are compiled, in place of Inductor."""
    thresholds: list[float] = []

    def compile_fx(module: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        for node in module.graph.nodes:
            if node.target is torch.ops.s2o.attention.default:
                thresholds.append(node.kwargs["threshold"])
        return module.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return thresholds


@pytest.mark.parametrize("backend", ["s2o", s2o])
def test_by_name_and_as_an_object(backend: Any, sparse_calls: list[float]) -> None:
    args = inputs()
    with torch.no_grad():
        options = EXACT.to_dict()
        output = torch.compile(causal, backend=backend, options=options)(*args)
    torch.testing.assert_close(output, causal(*args))
    assert sparse_calls == [0.0]


def test_with_config(sparse_calls: list[float]) -> None:
    backend = s2o.with_config(S2OConfig(min_length=0, threshold=0.25))
    with torch.no_grad():
        torch.compile(causal, backend=backend)(*inputs())
        torch.compile(lambda *x: causal(*x), backend=backend, options={"threshold": 0.5})(*inputs())
    assert sparse_calls == [0.25, 0.5]
    assert s2o.config == S2OConfig()
    assert backend.__name__ == "s2o"


@pytest.mark.parametrize(
    "call",
    [
        lambda config: s2o.with_config(config),
        lambda config: s2o_compile.attention(*inputs(), config=config),
        lambda config: s2o_compile.calibrate(tiny("llama"), tokens(40), error_budget=0.01, config=config),
        lambda config: s2o_compile.configure(tiny("llama"), config),
        lambda config: s2o_compile.explain(causal, *inputs(), config=config),
        lambda config: s2o_compile.export(tiny("llama"), (tokens(40),), config=config),
        lambda config: s2o_compile.visualize(tiny("llama"), tokens(40), config=config),
    ],
    ids=["with_config", "attention", "calibrate", "configure", "explain", "export", "visualize"],
)
def test_settings_of_the_wrong_type(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"^config must be an S2OConfig or None, not \{'threshold': 0.1\}$"):
        call({"threshold": 0.1})


def test_options_of_inductor_pass_through() -> None:
    config, patches = s2o.split_options(
        {"threshold": 0.1, "max-autotune": False, "triton.cudagraphs": False}, "max-autotune-no-cudagraphs"
    )
    assert config == S2OConfig(threshold=0.1)
    assert patches["max_autotune"] is False
    assert patches["triton.cudagraphs"] is False
    assert patches["coordinate_descent_tuning"] is True


@pytest.mark.parametrize(
    "options, message",
    [
        ({"treshold": 0.1}, r"unknown option 'treshold'; the options of s2o are threshold, min_length"),
        ({"threshold": 2}, r"threshold must be a number from 0 to below 1, not 2"),
        ({"threshold": "low"}, r"threshold must be a number, not 'low'"),
        ({"pool": 4}, r"pool is now a field of Ranking: .*options=\{'ranking': \{'pool': 4\}\}"),
        ({"tile": 16}, r"tile was removed: it follows segment"),
        ({"ranking": {"pools": 4}}, r"unknown field 'pools'; the fields of Ranking are rule, pool"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        s2o.split_options(options)
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(causal, backend="s2o", options=options)(*inputs())


@pytest.mark.timeout(280)
def test_through_inductor() -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return causal(q * 2, k, v).transpose(1, 2).reshape(2, -1, 16).relu()

    counts.clear()
    compiled = torch.compile(block, backend=Counting(EXACT), dynamic=True, fullgraph=True)
    for length in (20, 33, 48, 57, 80):
        args = inputs(queries=length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), block(*args), atol=1e-4, rtol=1e-4)
    assert len(counts) == 1


def test_a_scale_computed_from_the_length_is_compiled_once() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return (q @ k.mT * k.shape[2] ** -0.5).softmax(-1) @ v

    counts.clear()
    compiled = torch.compile(attend, backend=Counting(EXACT), dynamic=True, fullgraph=True)
    for length in (20, 33, 48):
        args = inputs(queries=length)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), attend(*args))
    assert len(counts) == 1


def decoding(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return sdpa(q[:, :, -1:], k, v)


def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.ops.s2o.attention(q, k, v, is_causal=True)


@pytest.mark.parametrize(
    ("function", "length", "longest"),
    [
        (causal, 20, None),
        (causal, 2048, None),
        (causal, 2048, 4096),
        (operator, 2048, None),
        (operator, 2048, 4096),
        (decoding, 10_000, None),
        (decoding, 10_000, 2**20),
    ],
)
def test_calls_that_run_dense_are_sdpa_to_inductor(
    function: Callable[..., torch.Tensor], length: int, longest: int | None
) -> None:
    """Nothing opaque stands around SDPA, neither at one length nor at symbolic ones up to `longest`."""
    args = inputs(batch=1, queries=length)
    if longest is not None:
        for x in args:
            torch._dynamo.mark_dynamic(x, 2, min=2, max=longest)
    with torch.no_grad(), fresh_cache():
        output, (code,) = run_and_get_code(torch.compile(function, backend="s2o"), *args)
        torch.testing.assert_close(output, function(*args), atol=1e-4, rtol=1e-4)
    assert code.count("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(") == 1
    assert "torch.ops.s2o" not in code


@pytest.mark.parametrize(("dynamic", "kind"), [(False, "sparse"), (True, "sparse if long")])
def test_the_report_says_where_lengths_decide(dynamic: bool, kind: str) -> None:
    backend = s2o.with_config(S2OConfig(min_length=20))
    with torch.no_grad():
        torch.compile(causal, backend=backend, dynamic=dynamic)(*inputs(queries=40))
    assert [decision.kind for decision in backend.report.decisions] == [kind]
    assert kind in str(backend.report)


def test_gradients_still_work() -> None:
    args = [x.requires_grad_() for x in inputs()]
    torch.compile(causal, backend=s2o.with_config(EXACT))(*args).sum().backward()
    assert all(x.grad is not None for x in args)


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(-1, -2) * 0.25


def filled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As GPT-2 writes its mask, with a number that hides nothing."""
    keep = torch.ones(1, 1, q.shape[1], k.shape[1], dtype=torch.bool).tril()
    logits = torch.matmul(q.permute(0, 2, 1, 3), k.permute(0, 2, 1, 3).permute(0, 1, 3, 2)).div(torch.full([], 4.0))
    return torch.where(keep, logits, torch.full((), -1.0)).softmax(-1).matmul(v.permute(0, 2, 1, 3))


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: torch.softmax(scores(q, k), -2) @ v,
        pytest.param(lambda q, k, v: torch.softmax(scores(q, k), 1) @ v, marks=pytest.mark.slow),
        pytest.param(lambda q, k, v: torch.softmax(q @ k.permute(2, 3, 0, 1) * 0.25, -1) @ v, marks=pytest.mark.slow),
        lambda q, k, v: torch.softmax(scores(q.permute(0, 3, 2, 1), k.permute(0, 2, 1, 3)), -1) @ v.transpose(1, 2),
        filled,
    ],
    ids=["over queries", "over heads", "keys of another batch", "permuted", "filled"],
)
def test_what_inductor_takes_for_attention(attend: Callable[..., torch.Tensor]) -> None:
    """Its patterns compare neither dimensions nor numbers that hide."""
    args = torch.randn(3, 8, 8, 8, 8).unbind()
    with torch.no_grad():
        output = torch.compile(lambda *x: attend(*x), backend="s2o")(*args)
    torch.testing.assert_close(output, attend(*args), atol=1e-5, rtol=1e-5)


def test_what_inductor_takes_for_attention_in_training() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores(q, k), -2) @ v

    args = torch.randn(3, 2, 8, 8, 8, requires_grad=True).unbind()
    outputs = torch.compile(attend, backend="s2o")(*args), attend(*args)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(output.square().sum(), args) for output in outputs), atol=1e-4, rtol=1e-4
    )


def test_written_out_attention_that_stays_dense_is_fused() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return torch.softmax(scores(q, k).masked_fill(hidden, -torch.inf), -1) @ v

    args = inputs(batch=1, queries=64)
    with torch.no_grad(), fresh_cache():
        output, (code,) = run_and_get_code(torch.compile(attend, backend="s2o"), *args)
        torch.testing.assert_close(output, attend(*args))
    assert code.count("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(") == 1


def test_graphs_whose_padding_is_read_are_cached_whole() -> None:
    """By AOTAutograd, so that another process need not trace them: nodes that are inserted have values."""

    def attend(q: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril() & padding.bool()[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=seen)

    q, padding = torch.randn(2, 2, 48, 16), torch.ones(2, 48, dtype=torch.int64)
    padding[1, :5] = 0
    hits = torch._dynamo.utils.counters["aot_autograd"]
    exact = s2o.with_config(S2OConfig(min_length=0, threshold=0))
    with torch.no_grad(), fresh_cache():
        for expected in (0, 1):
            torch.compiler.reset()
            hits.clear()
            output = torch.compile(attend, backend=exact, dynamic=True)(q, padding)
            assert hits["autograd_cache_hit"] == expected and not hits["autograd_cache_bypass"]
            assert [decision.rewritten for decision in exact.report.decisions] == [True]
            torch.testing.assert_close(output[1, :, 5:], attend(q, padding)[1, :, 5:])
            torch.testing.assert_close(output[0], attend(q, padding)[0])


PREFERRING = """
import sys, torch, s2o_compile
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

def attend(q):
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

for names in sys.argv[1:]:
    torch._dynamo.reset()
    hits = torch._dynamo.utils.counters
    hits.clear()
    backends = [getattr(SDPBackend, name) for name in names.split(",")]
    with torch.no_grad(), sdpa_kernel(backends, set_priority=True):
        q = torch.randn(1, 2, 64, 16)
        compiled = torch.compile(attend, backend="s2o")
        compiled(q)
        with profile() as profiled:
            compiled(q)
    print(any("scaled_dot_product_flash" in event.key for event in profiled.key_averages()))
    print(hits["aot_autograd"]["autograd_cache_hit"] + hits["inductor"]["fxgraph_cache_hit"] > 0)
"""


def test_caches_know_the_preferred_backends_of_sdpa(tmp_path: Path) -> None:
    """Across processes, in both directions; and they still serve what was compiled alike."""

    def fuses_and_hits(*backends: str) -> list[str]:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-W", "ignore", "-c", PREFERRING, *backends]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    both = "FLASH_ATTENTION,MATH"
    assert fuses_and_hits("MATH", both) == ["False", "False", "True", "False"]
    again = fuses_and_hits("MATH", both, "MATH,FLASH_ATTENTION")
    assert again[:4] == ["False", "True", "True", "True"] and again[5] == "False"


def test_a_rewritten_graph_that_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor gets the graph as it was, unless errors are asked for."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("the operator is broken")

    monkeypatch.setattr("s2o_compile.ops.operator.validate", fail)
    backend, args = s2o.with_config(EXACT), inputs()
    with torch.no_grad():
        with pytest.raises(Exception, match="the operator is broken"):
            torch.compile(causal, backend=backend)(*args)
        monkeypatch.setenv("S2O_RAISE_ERRORS", "")
        torch._dynamo.reset()
        with pytest.warns(RuntimeWarning, match="the operator is broken"):
            output = torch.compile(causal, backend=backend)(*args)
        torch.testing.assert_close(output, causal(*args))
    (decision,) = backend.report.decisions
    assert not decision.rewritten and "did not compile" in decision.reason


def test_torch_that_moved_its_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilation goes on without the switch."""
    monkeypatch.setenv("S2O_RAISE_ERRORS", "")
    monkeypatch.delattr("torch._inductor.fx_passes.joint_graph.patterns")
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="cannot import name 'patterns'"):
        output = torch.compile(lambda q: q + 1, backend=S2OBackend())(torch.zeros(2))
    assert output.tolist() == [1, 1]


def test_errors_of_inductor_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2O_RAISE_ERRORS", "")

    def fail(graph: torch.fx.Graph) -> None:
        raise RuntimeError("this pass is broken")

    with torch.no_grad(), pytest.raises(Exception, match="this pass is broken"):
        torch.compile(causal, backend="s2o", options={"post_grad_custom_pre_pass": fail})(*inputs())


def test_settings_cannot_change() -> None:
    backend = S2OBackend(EXACT)
    with pytest.raises(AttributeError, match=r"^config cannot be changed, .* pass backend=s2o\.with_config\(config\)$"):
        backend.config = S2OConfig()
    assert backend.config == EXACT and backend.with_config(S2OConfig()).config == S2OConfig()


@pytest.mark.usefixtures("sparse_calls")
class TestReport:
    """What a backend tells of the graphs that it compiled."""

    def test_accumulates_until_reset(self) -> None:
        def broken(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            x = causal(q, k, v)
            torch._dynamo.graph_break()
            return sdpa(x, k, v)

        backend = s2o.with_config(S2OConfig(min_length=30))
        assert backend.report.decisions == []
        with torch.no_grad():
            compiled = torch.compile(broken, backend=backend, dynamic=False)
            compiled(*inputs(queries=40))
            assert (backend.report.rewritten, backend.report.dense) == (2, 0)
            compiled(*inputs(queries=20))
            assert (backend.report.rewritten, backend.report.dense) == (2, 2)
            assert backend.with_config(EXACT).report.decisions == []
        torch.compiler.reset()
        assert backend.report.decisions == []

    def test_the_registered_backend(self) -> None:
        with torch.no_grad():
            torch.compile(causal, backend="s2o", options={"min_length": 0})(*inputs())
        assert s2o_compile.s2o.report.rewritten == 1

    def test_a_warning_once_where_nothing_is_rewritten(self) -> None:
        def two(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return causal(causal(q, k, v), k, v) + sdpa(q, k, v, attn_mask=q[:, :, :, :1])

        backend = S2OBackend()
        with torch.no_grad(), pytest.warns(UserWarning) as caught:
            torch.compile(two, backend=backend)(*inputs())
            torch.compile(causal, backend=backend)(*inputs())
        assert len(caught) == 1
        assert "3 of 3 attention sites" in str(caught[0].message)
        assert "3 because: 20 queries over 20 keys are too few" in str(caught[0].message)
        assert "min_length=0" in str(caught[0].message)

    @pytest.mark.filterwarnings("error")
    def test_no_warning_where_a_site_is_rewritten_or_decodes(self) -> None:
        backend = s2o.with_config(S2OConfig(min_length=30))
        with torch.no_grad():
            torch.compile(decoding, backend=backend)(*inputs(queries=40))
            torch.compile(causal, backend=backend, dynamic=False)(*inputs(queries=40))
            torch.compile(lambda *x: causal(*x), backend=backend, dynamic=False)(*inputs(queries=20))
            torch.compile(lambda q: q + 1, backend=S2OBackend())(torch.ones(2))


@pytest.mark.usefixtures("sparse_calls")
class TestModels:
    """Whole models; Inductor is replaced by running the graphs as they are."""

    def compile(self, model: torch.nn.Module, **kwargs: Any) -> tuple[Any, CompileCounterWithBackend]:
        counter = CompileCounterWithBackend("eager")
        backend = s2o.with_config(EXACT)

        def counted(module: torch.fx.GraphModule, args: Any) -> Any:
            counter.frame_count += 1
            return backend(module, args)

        return torch.compile(model, backend=counted, **kwargs), counter

    def test_five_lengths_compile_once(self, sparse_calls: list[float]) -> None:
        model = tiny("llama")
        compiled, counter = self.compile(model, dynamic=True, fullgraph=True)
        for length in (20, 31, 40, 55, 64):
            ids = tokens(length)
            with torch.no_grad():
                torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        assert counter.frame_count == 1
        assert len(sparse_calls) == 2

    def test_inference_mode(self, sparse_calls: list[float]) -> None:
        model, ids = tiny("llama"), tokens(40)
        compiled, _ = self.compile(model, fullgraph=True)
        with torch.inference_mode():
            torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
        assert len(sparse_calls) == 2

    def test_a_model_is_reused(self, sparse_calls: list[float]) -> None:
        model, ids = tiny("gpt2"), tokens(40)
        compiled, counter = self.compile(model)
        with torch.no_grad():
            first, second = compiled(ids).logits, compiled(ids).logits
        torch.testing.assert_close(first, second)
        assert counter.frame_count == 1

    def test_graph_breaks(self, sparse_calls: list[float]) -> None:
        class Broken(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.project = torch.nn.Linear(8, 8)

            def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                x = causal(q, k, v)
                torch._dynamo.graph_break()
                return sdpa(self.project(x), k, v)

        model, args = Broken(), inputs()
        compiled, _ = self.compile(model)
        with torch.no_grad():
            torch.testing.assert_close(compiled(*args), model(*args), atol=1e-4, rtol=1e-4)
        assert len(sparse_calls) == 2


def test_attention_front() -> None:
    args = inputs()
    output = s2o_compile.attention(*args, is_causal=True, config=EXACT)
    torch.testing.assert_close(output, causal(*args))
    result = s2o_compile.attention(*args, is_causal=True, config=EXACT, return_stats=True)
    torch.testing.assert_close(result.output, output)
    assert result.visited.shape == (2, 2, 2)
    assert result.lse.shape == (2, 2, 20)


def test_import_is_light() -> None:
    heavy = ("triton", "sympy", "transformers", "matplotlib", "rich", "torch._inductor", "torch._dynamo")
    code = f"import sys, torch, s2o_compile, s2o_compile.backend; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_on_a_gpu(dynamic: bool) -> None:
    """A tiny Llama in bfloat16: every site rewritten, its kernels compiled by Inductor, the same numbers."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(settings).cuda().bfloat16().eval()
    tokens = torch.randint(100, (2, 600), device="cuda")
    config = S2OConfig(threshold=0.0, min_length=0)
    with torch.no_grad():
        want = model(tokens, use_cache=True).logits
        got = torch.compile(model, backend=s2o.with_config(config), dynamic=dynamic)(tokens, use_cache=True).logits
    assert (got - want).abs().max() < 0.1
    assert s2o_compile.explain(model, tokens, use_cache=True, config=config).rewritten == 2


@pytest.mark.parametrize(
    ("setting", "lines"),
    [
        pytest.param(None, 0, marks=pytest.mark.slow),
        pytest.param("s2o_compile", 1, marks=pytest.mark.slow),
        ("+s2o_compile", 2),
    ],
)
def test_log(setting: str | None, lines: int) -> None:
    program = (
        "import torch, s2o_compile, torch._inductor.compile_fx as inductor\n"
        "inductor.compile_fx = lambda module, inputs, **options: module.forward\n"
        "q = torch.randn(1, 2, 32, 8)\n"
        "f = lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)\n"
        "torch.no_grad().__enter__()\n"
        "torch.compile(f, backend=lambda *a: s2o_compile.s2o(*a, options={'min_length': 0}))(q)\n"
    )
    environment = os.environ | ({"TORCH_LOGS": setting} if setting else {})
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = [line for line in run.stderr.splitlines() if "s2o_compile" in line]
    assert len(found) == lines
    assert not found or "1 of 1 attention sites rewritten" in found[0]
    assert lines < 2 or "sparse; causal, offset 0" in found[1]


@pytest.mark.parametrize("order", [pytest.param("torch, s2o_compile", marks=pytest.mark.slow), "s2o_compile, torch"])
def test_the_operator_is_there_in_any_order_of_imports(order: str) -> None:
    run = subprocess.run([sys.executable, "-c", f"import {order}; torch.ops.s2o.attention.default"])
    assert run.returncode == 0


def test_names_of_the_package() -> None:
    assert set(s2o_compile.__all__) <= set(dir(s2o_compile))
    assert all(getattr(s2o_compile, name) is not None for name in s2o_compile.__all__)
    with pytest.raises(AttributeError, match="no attribute 'attend'"):
        _ = s2o_compile.attend
