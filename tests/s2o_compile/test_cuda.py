"""Models on a GPU: compiled without waiting, in CUDA graphs, padded, generating, and packaged ahead of time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import s2o_compile
from s2o_compile import S2OConfig, s2o

from ..passes.models import padding

pytestmark = pytest.mark.gpu

EXACT = S2OConfig(threshold=0.0, min_length=0)
LENGTH = 600


def llama(attention: str = "sdpa") -> Any:
    """A small Llama of random weights in float32."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=100, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(settings, attn_implementation=attention).cuda().eval()
    for parameter in model.parameters():
        # Larger than what models start with, so that attention is far from uniform.
        parameter.data.normal_(std=0.1)
    return model


def prompts(seed: int) -> dict[str, Any]:
    """Two prompts, of which the first is padded on the left."""
    generator = torch.Generator("cuda").manual_seed(seed)
    ids = torch.randint(1, 100, (2, LENGTH), generator=generator, device="cuda")
    return {"input_ids": ids, "attention_mask": padding(LENGTH, "left").cuda()}


def logits(model: Any, seed: int) -> torch.Tensor:
    """What a model computes for `prompts`, without the rows of padding."""
    with torch.no_grad():
        return model(**prompts(seed), use_cache=False).logits[:, 9:].clone()


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_modes(mode: str) -> None:
    """Equal to dense attention for new inputs, and no graph of kernels is given up."""
    counters.clear()
    model = llama()
    compiled = torch.compile(model, backend=s2o.with_config(EXACT), mode=mode)
    for seed in range(4):
        torch.testing.assert_close(logits(compiled, seed), logits(model, seed), atol=1e-3, rtol=1e-3)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert s2o_compile.explain(model, **prompts(0), use_cache=False, config=EXACT).rewritten == 2


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_models_do_not_wait_and_repeat_themselves(mode: str) -> None:
    compiled = torch.compile(llama(), backend=s2o.with_config(S2OConfig(min_length=0)), mode=mode)
    inputs = prompts(0)
    with torch.no_grad():
        for _ in range(3):
            want = compiled(**inputs, use_cache=False).logits.clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = compiled(**inputs, use_cache=False).logits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache: str) -> None:
    dense, sparse = llama(), llama("s2o")
    s2o_compile.configure(sparse, EXACT)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    assert torch.equal(sparse.generate(**prompts(0), **options), dense.generate(**prompts(0), **options))


class Logits(torch.nn.Module):
    """A language model as a function of token ids and their padding."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits


RUN = """
import sys, torch
package, inputs, output = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
torch.save(run(*torch.load(inputs)), output)
assert "s2o_compile" not in sys.modules
"""


class Attention(torch.nn.Module):
    """PyTorch's own attention and nothing else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Crashed(Exception):
    """A process was ended by a signal."""


def run_package(program: torch.export.ExportedProgram, inputs: tuple[torch.Tensor, ...], folder: Path) -> torch.Tensor:
    """What the package of a program computes in a process of its own.

    Raises:
        Crashed: That process did.
    """
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))
    files = [package, str(folder / "inputs.pt"), str(folder / "output.pt")]
    torch.save(inputs, files[1])
    done = subprocess.run([sys.executable, "-c", RUN, *files], capture_output=True, text=True)
    if done.returncode < 0:
        raise Crashed(signal.Signals(-done.returncode).name)
    assert done.returncode == 0, done.stderr
    return torch.load(files[2])


@pytest.fixture
def packages_run(tmp_path: Path) -> None:
    """Skips where PyTorch does not run a package of its own attention either: torch 2.11 on an H200."""
    x = torch.randn(1, 2, 64, 32, device="cuda")
    program = torch.export.export(Attention(), (x,))
    (folder := tmp_path / "plain").mkdir()
    try:
        got = run_package(program, (x,), folder)
    except Crashed as crash:
        pytest.skip(f"a package of nothing but PyTorch's attention ends the process that loads it, too: {crash}")
    torch.testing.assert_close(got, Attention()(x), atol=1e-3, rtol=1e-3)


@pytest.mark.usefixtures("packages_run")
def test_a_package_carries_its_kernels(tmp_path: Path) -> None:
    """Where shapes are static it runs in a process that does not import this project."""
    model = Logits(llama())
    program = s2o_compile.export(model, tuple(prompts(0).values()), config=EXACT)
    got = run_package(program, tuple(prompts(1).values()), tmp_path)
    torch.testing.assert_close(got[:, 9:], logits(model.model, 1), atol=1e-3, rtol=1e-3)
