"""Whole prefills: a random model visits the density asked for, and each way to run and to call it has a row."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch._inductor.utils import fresh_cache
from torch.nn.attention import SDPBackend
from torch.profiler import profile

from benchmarks.prefill.backends import (
    BACKENDS,
    EAGER,
    EAGER_FLASH,
    EAGER_S2O,
    INDUCTOR,
    KEPT_DENSE,
    NO_ATTENTION,
    ONE_LENGTH,
    S2O,
    UNCOMPILED,
    Contender,
    Contenders,
    choose_backends,
    first_tokens,
    preferring,
)
from benchmarks.prefill.budget import visited_density, with_density
from benchmarks.prefill.calls import Call, padded_calls, plain_calls
from benchmarks.prefill.measure import Row, attention_share, measure
from benchmarks.prefill.models import RANDOM_LLAMA, Subject, llama, load, random_model
from benchmarks.prefill.report import as_dict, cells, describe, table
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig
from s2o_compile.testbed.predict import compiled_graphs

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
    call = Call("alone", (inputs(subject, 100),))

    def fuses(backends: list[SDPBackend]) -> bool:
        torch.compiler.reset()
        with preferring(backends):
            run = Contender(subject.model, INDUCTOR, S2OConfig(), dynamic=False)
            run(call)
            with profile() as profiled:
                run(call)
        return any("scaled_dot_product_flash" in event.key for event in profiled.key_averages())

    with fresh_cache():
        assert not fuses([SDPBackend.MATH])
        assert fuses([])


def eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs run as they are, rewritten: Inductor takes half a minute for all rows."""
    compile_model = torch.compile
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward)
    monkeypatch.setattr(
        "benchmarks.prefill.backends.torch.compile",
        lambda model, backend, **options: compile_model(
            model, backend="eager" if backend == "inductor" else backend, **options
        ),
    )


def test_calls_are_those_of_a_tokenizer() -> None:
    tokens = torch.arange(1, 17)[None]
    with_mask, without = plain_calls(tokens, (True, False))
    assert with_mask.inputs[0]["attention_mask"].tolist() == [[1] * 16]
    assert with_mask.inputs[0]["attention_mask"].dtype == torch.int64
    assert "attention_mask" not in without.inputs[0]
    alone, batch = padded_calls(tokens)
    assert [prompt["input_ids"].shape[1] for prompt in alone.inputs] == [16, 14, 12, 8] and alone.is_dynamic
    (padded,) = batch.inputs
    assert padded["attention_mask"].sum(1).tolist() == [16, 14, 12, 8] and not batch.is_dynamic
    for prompt, row, mask in zip(alone.inputs, padded["input_ids"], padded["attention_mask"], strict=True):
        assert torch.equal(row[mask.bool()], prompt["input_ids"][0]) and bool(mask[-1])


def test_rows_are_whole() -> None:
    """With Inductor."""
    subject, steps = tiny(), list[str]()
    prompt = subject.tokens(600, None)
    calls = plain_calls(prompt, (True,))
    rows = measure(Contenders(subject.model), prompt, calls, S2OConfig(min_length=0), 0.6, 1, True, steps.append)
    assert tuple(row.backend for row in rows) == BACKENDS and not any(row.reason for row in rows)
    eager, inductor, kept, sparse = rows
    assert eager.to_eager == 1 and eager.compile_seconds is None
    assert all(row.seconds and row.to_eager and row.compile_seconds for row in (inductor, kept, sparse))
    assert sparse.density == pytest.approx(0.6, rel=0.2) and sparse.threshold and inductor.threshold is None
    assert (eager.sites, inductor.sites, kept.sites, sparse.sites) == ("", "", "1 dense", "1 sparse")
    assert "warming up s2o, mask of ones" in steps
    assert 0 <= first_tokens(subject.model, inputs(subject, 100))[0] < 64


def test_long_calls_kept_dense_have_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    eagerly(monkeypatch)
    subject = tiny()
    prompt = subject.tokens(1100, None)
    rows = measure(
        Contenders(subject.model),
        prompt,
        plain_calls(prompt, (True, False)),
        S2OConfig(),
        None,
        1,
        True,
        lambda step: None,
    )
    assert [(row.call, row.backend) for row in rows] == [
        (call, backend) for call in ("mask of ones", "no mask") for backend in BACKENDS
    ]
    found = {(row.call, row.sites) for row in rows if row.backend in (KEPT_DENSE, S2O)}
    # Without the tokenizer's mask, transformers sets is_causal and there is none.
    assert found == {("mask of ones", "1 dense, no mask"), ("no mask", "1 dense")}
    assert all(row.density == pytest.approx(1, abs=0.1) and not row.reason for row in rows)


def test_a_padded_batch_and_its_prompts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    eagerly(monkeypatch)
    torch.compiler.reset()
    subject, config = tiny(), S2OConfig(min_length=0, threshold=0)
    prompt = subject.tokens(300, None)
    calls, ways = padded_calls(prompt), Contenders(subject.model)
    rows = measure(ways, prompt, calls, config, None, 1, True, lambda step: None)
    assert len(rows) == 8 and not any(row.reason for row in rows)
    assert {row.sites for row in rows if row.backend == S2O} == {"1 sparse"}
    assert all(row.density is None for row in rows)
    for call in calls:
        expected = ways.get(EAGER, call, config)(call)
        assert len(expected) == 4 and ways.get(S2O, call, config)(call) == expected


def test_one_compilation_serves_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """But that of Inductor for one length."""
    eagerly(monkeypatch)
    torch.compiler.reset()
    subject, graphs = tiny(), []
    ways = Contenders(subject.model, (INDUCTOR, ONE_LENGTH), dynamic=True)
    for length in (300, 400):
        prompt = subject.tokens(length, None)
        before = compiled_graphs()
        rows = measure(ways, prompt, plain_calls(prompt, (True,)), S2OConfig(), None, 1, True, lambda step: None)
        assert [row.backend for row in rows] == [INDUCTOR, ONE_LENGTH] and not any(row.reason for row in rows)
        graphs.append(compiled_graphs() - before)
    assert graphs == [2, 1]


def test_a_threshold_is_compiled_only_once() -> None:
    """Of each contender there is one for a call and a setting, or, for each length, another."""
    call, other = Call("alone", ()), Call("another", ())
    once, each = Contenders(None, dynamic=True), Contenders(None)
    for ways, same in ((once, True), (each, False)):
        first = ways.get(S2O, call, S2OConfig())
        assert ways.get(S2O, call, S2OConfig()) is first
        assert ways.get(S2O, other, S2OConfig()) is not first
        assert ways.get(S2O, call, S2OConfig(threshold=0.5)) is not first
        kept = ways.get(KEPT_DENSE, call, S2OConfig())
        assert ways.get(KEPT_DENSE, call, S2OConfig(threshold=0.5)) is kept
        ways.begin_length()
        assert (ways.get(S2O, call, S2OConfig()) is first) is same


def test_rows_are_chosen() -> None:
    assert choose_backends([]) == BACKENDS
    assert choose_backends([S2O, ONE_LENGTH]) == (ONE_LENGTH, S2O)
    with pytest.raises(UsageError, match=r"--only must be one of 'eager', .*, not 'flash'"):
        choose_backends(["flash"])


def test_without_eager_there_are_no_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    eagerly(monkeypatch)
    subject = tiny()
    prompt = subject.tokens(100, None)
    ways = Contenders(subject.model, (S2O,))
    (alone,) = measure(ways, prompt, plain_calls(prompt, (False,)), S2OConfig(), None, 1, True, lambda step: None)
    assert alone.seconds and alone.to_eager is None


def test_attention_of_what_is_not_compiled_is_timed_by_leaving_it_out() -> None:
    subject = tiny()
    prompt, ways = subject.tokens(200, None), Contenders(subject.model, UNCOMPILED)
    calls = plain_calls(prompt, (True,))
    config = S2OConfig(min_length=0, threshold=0)
    rows = measure(ways, prompt, calls, config, None, 3, False, lambda step: None)
    by_name = {row.backend: row for row in rows}
    assert list(by_name) == [EAGER, EAGER_FLASH, EAGER_S2O, NO_ATTENTION]
    assert all(row.seconds and row.compile_seconds is None and not row.reason for row in rows)
    for name in (EAGER, EAGER_FLASH, EAGER_S2O):
        row, without = by_name[name], by_name[NO_ATTENTION].seconds
        assert row.seconds and without and row.attention_seconds == row.seconds - without
    assert by_name[NO_ATTENTION].attention_seconds is by_name[NO_ATTENTION].density is None
    assert by_name[EAGER_S2O].threshold == 0
    assert subject.model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        models = [ways.get(name, calls[0], config)._model for name in by_name]
        dense, flash, sparse, zeros = (model(**calls[0].inputs[0]).logits for model in models)
    torch.testing.assert_close(torch.cat([flash, sparse]), torch.cat([dense, dense]), atol=1e-4, rtol=1e-3)
    assert (zeros - dense).abs().max() > 1e-2


def test_what_runs_out_of_memory_leaves_the_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    eagerly(monkeypatch)
    subject = tiny()
    prompt = subject.tokens(100, None)
    ways, calls = Contenders(subject.model), plain_calls(prompt, (True,))
    ways.begin_length()
    monkeypatch.setattr(ways, "begin_length", lambda: None)
    monkeypatch.setattr(ways.get(INDUCTOR, calls[0], S2OConfig()), "_model", refuse)
    eager, inductor, kept, sparse = measure(ways, prompt, calls, S2OConfig(), None, 1, True, lambda step: None)
    assert inductor.reason == "CUDA out of memory. Tried to allocate 64 GiB" and inductor.seconds is None
    assert all(row.seconds and row.to_eager and not row.reason for row in (eager, kept, sparse))


def test_what_does_not_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no room here\nand more")

    subject = tiny()
    prompt = subject.tokens(100, None)
    calls = plain_calls(prompt, (False,))
    monkeypatch.setattr("benchmarks.prefill.backends.torch.compile", fail)
    with pytest.raises(RuntimeError):
        measure(Contenders(subject.model), prompt, calls, S2OConfig(), None, 1, True, lambda step: None)
    monkeypatch.setattr("benchmarks.prefill.backends.torch.compile", lambda *_, **__: fail)
    eager, *compiled = measure(Contenders(subject.model), prompt, calls, S2OConfig(), None, 1, True, lambda step: None)
    assert not eager.reason and eager.seconds
    assert [row.reason for row in compiled] == ["no room here"] * 3
    assert all(row.seconds is None and row.to_eager is None for row in compiled)


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
    rows = [Row(8192, "no mask", "inductor", 1.0, 0.1, 1.0), Row(200_000, "no mask", "s2o", reason="no room")]
    note = describe(subject, 0.1)
    assert "random tokens" in note and "to visit about 0.1" in note
    assert "prefers cuDNN" in describe(subject, 0.1, cudnn=True)
    assert describe(subject, None, dynamic=True, yarn=4.0).endswith("compiled once for all lengths; YaRN 4.")
    assert cells(rows[0])[:4] == ["1,000.0", "10%", "1.00", ""]
    shown = table(rows, note, subject.positions)
    assert shown.row_count == 2 and "no room" in str(shown.caption) and "131,072 positions" in str(shown.caption)
    assert json.loads(json.dumps(as_dict(subject, rows, note, 3)))["rows"][1]["reason"] == "no room"


def test_weights_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.prefill.models.free_bytes", lambda device: 2**30)
    with pytest.raises(UsageError, match=r"The weights of 32 layers take 29.9 GiB and 1.0 GiB are free"):
        load(RANDOM_LLAMA, 32, CPU, torch.float32)
