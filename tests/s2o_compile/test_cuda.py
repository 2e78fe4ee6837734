"""Models on a GPU: compiled without waiting, in CUDA graphs, padded, generating, and packaged ahead of time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
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
        num_key_value_heads=2, head_dim=128, max_position_embeddings=1024,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
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


BOUND_COMPILER = """#!/bin/sh
case " $* " in *" -shared "*) set -- "$@" -Wl,-Bsymbolic ;; esac
exec g++ "$@"
"""


@pytest.fixture
def bound_symbols(tmp_path: Path) -> Iterator[None]:
    """Packages call their own copy of std::regex; cuFile, which PyTorch loads for all, exports that of an older GCC."""
    compiler = tmp_path / "g++"
    compiler.write_text(BOUND_COMPILER)
    compiler.chmod(0o755)
    with torch._inductor.config.patch({"cpp.cxx": (None, str(compiler))}):
        yield


@pytest.mark.usefixtures("bound_symbols")
@pytest.mark.parametrize("config", [EXACT, S2OConfig(min_length=0)], ids=["exact", "sparse"])
def test_a_package_carries_its_kernels(config: S2OConfig, tmp_path: Path) -> None:
    """Where shapes are static it runs in a process that does not import this project."""
    model, inputs = Logits(llama()), tuple(prompts(0).values())
    program = s2o_compile.export(model, inputs, config=config)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    files = [package, str(tmp_path / "inputs.pt"), str(tmp_path / "output.pt")]
    inputs = tuple(prompts(1).values())
    torch.save(inputs, files[1])
    done = subprocess.run([sys.executable, "-c", RUN, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    got = torch.load(files[2])
    with torch.no_grad():
        want = program.module()(*inputs)
    # A key at its draw may be visited by one and not by the other.
    tolerance = 1e-3 if config is EXACT else 2e-2
    torch.testing.assert_close(got[:, 9:], want[:, 9:], atol=tolerance, rtol=tolerance)
