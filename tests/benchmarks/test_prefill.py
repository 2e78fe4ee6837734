"""Whole prefills: a random model visits the density asked for, and both backends have a row."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend
from torch.profiler import profile

from benchmarks.prefill.budget import visited_density, with_density
from benchmarks.prefill.measure import Row, attention_share, compiled, first_token, measure, preferring
from benchmarks.prefill.models import RANDOM_LLAMA, Subject, llama, load, random_model
from benchmarks.prefill.report import as_dict, describe, table
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig

CPU = torch.device("cpu")


def tiny(layers: int = 1) -> Subject:
    config = llama(layers)
    config.update({"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2})
    return Subject("tiny", random_model(config, CPU, torch.float32), None)


def inputs(subject: Subject, length: int) -> dict[str, Any]:
    return {"input_ids": subject.tokens(length, None), "use_cache": True, "logits_to_keep": 1}


def test_the_shape_is_that_of_llama() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama(32))
    assert sum(weight.numel() for weight in model.parameters()) == 8_030_261_248


def test_the_threshold_fixes_the_density() -> None:
    subject = tiny(3)
    prompt, config = inputs(subject, 2000), S2OConfig(min_length=0)
    chosen = with_density(subject.model, prompt, config, 0.3)
    assert visited_density(subject.model, prompt, chosen) == pytest.approx(0.3, rel=0.15)
    dense = S2OConfig(min_length=0, threshold=0)
    assert visited_density(subject.model, prompt, dense) == pytest.approx(1, abs=0.05)


def test_calls_that_run_dense_visit_everything() -> None:
    subject = tiny()
    assert visited_density(subject.model, inputs(subject, 300), S2OConfig()) == pytest.approx(1, abs=0.1)


@pytest.mark.slow
def test_a_preferred_backend_is_that_of_no_other_row() -> None:
    """Though Inductor caches what it compiles."""
    torch.compiler.reset()
    subject = tiny()
    prompt = inputs(subject, 100)

    def fuses(run: Callable[[dict[str, Any]], int]) -> bool:
        run(prompt)
        with profile() as profiled:
            run(prompt)
        return any("scaled_dot_product_flash" in event.key for event in profiled.key_averages())

    with fresh_cache():
        assert not fuses(preferring([SDPBackend.MATH], subject.model))
        assert fuses(compiled(subject.model, S2OConfig())["inductor"])


def test_rows_are_whole() -> None:
    subject, steps = tiny(), list[str]()
    prompt = subject.tokens(600, None)
    dense, sparse = measure(subject.model, prompt, S2OConfig(min_length=0), 0.6, 1, steps.append)
    assert (dense.backend, sparse.backend) == ("inductor", "s2o") and not dense.reason and not sparse.reason
    assert dense.speedup == 1 and dense.seconds and sparse.seconds and sparse.speedup
    assert sparse.density == pytest.approx(0.6, rel=0.2) and sparse.threshold and dense.threshold is None
    assert "compiling with s2o" in steps
    assert 0 <= first_token(subject.model, inputs(subject, 100)) < 64


def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room here\nand more")

    subject = tiny()
    monkeypatch.setattr("benchmarks.prefill.measure.torch.compile", fail)
    with pytest.raises(RuntimeError):
        measure(subject.model, subject.tokens(100, None), S2OConfig(), None, 1, lambda step: None)
    monkeypatch.setattr("benchmarks.prefill.measure.torch.compile", lambda *_, **__: fail)
    rows = measure(subject.model, subject.tokens(100, None), S2OConfig(), None, 1, lambda step: None)
    assert [row.reason for row in rows] == ["no room here"] * 2
    assert all(row.seconds is None for row in rows)


def test_attention_is_told_by_the_names_of_kernels() -> None:
    kernels = {
        "importance_kernel_0": 1.0,
        "void pytorch_flash::flash_fwd_kernel": 1.0,
        "nvjet_hsh": 1.0,
        "triton_poi_fused_flash": 1.0,
    }
    assert attention_share(kernels) == 0.5


def test_reports() -> None:
    subject = tiny()
    rows = [Row(8192, "inductor", 1.0, 0.1, 1.0), Row(200_000, "s2o", reason="no room")]
    note = describe(subject, 0.1)
    assert "random tokens" in note and "to visit about 0.1" in note
    shown = table(rows, note, subject.positions)
    assert shown.row_count == 2 and "no room" in str(shown.caption) and "131,072 positions" in str(shown.caption)
    assert json.loads(json.dumps(as_dict(subject, rows, note, 3)))["rows"][1]["reason"] == "no room"


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.prefill.models.free_bytes", lambda device: 2**30)
    with pytest.raises(UsageError, match=r"The weights of 32 layers take 29.9 GiB and 1.0 GiB are free"):
        load(RANDOM_LLAMA, 32, CPU, torch.float32)
