"""Profiles of sparse calls: what they count, for compiled models, transformers and direct calls."""

from __future__ import annotations

import dataclasses
import json
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import s2o_compile
from s2o_compile import attention, explain, profile
from s2o_compile.ops.density import density

from ..examples import examples
from ..passes.capture import EXACT, inputs
from ..passes.models import tiny, tokens

SPARSE = dataclasses.replace(EXACT, threshold=0.05)
EVERY_ROW = 10**6


def test_sites_of_a_compiled_model() -> None:
    model, ids = tiny("llama"), tokens(100)
    compiled = torch.compile(model, backend=s2o_compile.s2o.with_config(SPARSE))
    with torch.no_grad():
        compiled(ids)
        with profile() as p:
            compiled(ids)
            compiled(ids)
        compiled(ids)
    names = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [(site.name, site.calls) for site in p.sites] == [(name, 2) for name in names]
    assert sum(site.time_share for site in p.sites) == pytest.approx(1)
    for site, decision in zip(p.sites, explain(model, ids, config=SPARSE, measure=True).decisions, strict=True):
        assert decision.density is not None
        assert site.density == pytest.approx(sum(decision.density) / len(decision.density))


@pytest.mark.parametrize("through_inductor", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_compiled_model_of_any_length(through_inductor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not through_inductor:
        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward)
    compiled = torch.compile(tiny("llama", layers=1), backend=s2o_compile.s2o.with_config(SPARSE), dynamic=True)
    with torch.no_grad(), profile() as p:
        compiled(tokens(60))
        compiled(tokens(90))
    assert [(site.name, site.calls) for site in p.sites] == [("model.layers.0.self_attn", 2)]


def test_layers_of_transformers() -> None:
    model = tiny("llama")
    model.set_attn_implementation("s2o")
    s2o_compile.configure(model, SPARSE)
    with torch.no_grad(), profile() as p:
        model(tokens(100))
    assert [site.name for site in p.sites] == ["LlamaAttention 0", "LlamaAttention 1"]


def test_work_of_a_direct_call() -> None:
    args = inputs(queries=100, keys=170)
    with profile() as p:
        result = attention(*args, is_causal=True, causal_offset=70, config=SPARSE, return_stats=True)
        attention(*args, is_causal=True, causal_offset=70)
    (site,) = p.sites
    assert site.name == "query [2, 2, 100, 8], key [2, 2, 170, 8]"
    assert site.calls == 1, "the second call ran dense"
    assert site.flops == result.visited.sum().item() * 2 * (8 + 8)
    assert site.density == pytest.approx(density(result.visited, 100, 170, True, 70, SPARSE.ranking.tile).mean().item())


@settings(max_examples=examples(10))
@given(
    st.booleans(), st.sampled_from([None, 30]), st.booleans(), st.sampled_from([0.0, 2.0]), st.sampled_from([0, 0.2])
)
def test_error_is_that_against_dense(
    is_causal: bool, window: int | None, masked: bool, softcap: float, threshold: float
) -> None:
    torch.manual_seed(0)
    args = inputs(queries=90)
    terms = {"is_causal": is_causal, "window": window, "softcap": softcap}
    terms["mask"] = torch.rand(2, 1, 90, 90) > 0.3 if masked else None
    config = dataclasses.replace(EXACT, threshold=threshold)
    with profile(error_rows=EVERY_ROW) as p:
        sparse = attention(*args, **terms, config=config)
    dense = attention(*args, **terms, config=EXACT)
    expected = (sparse - dense).square().sum() / dense.square().sum()
    assert p.sites[0].error == pytest.approx(expected.item(), rel=1e-3, abs=1e-10)


def test_sampled_error_approaches_the_whole() -> None:
    torch.manual_seed(0)
    args = inputs(queries=400)
    with profile(error_rows=EVERY_ROW) as whole, profile(error_rows=40) as sample, profile(error_rows=0) as none:
        attention(*args, is_causal=True, config=SPARSE)
    errors = [p.sites[0].error for p in (whole, sample, none)]
    assert errors[1] == pytest.approx(errors[0], rel=0.5)
    assert errors[2] is None


def test_threads_are_profiled_apart() -> None:
    args = inputs(queries=50)
    with profile() as p:
        thread = threading.Thread(target=attention, args=args, kwargs={"config": SPARSE})
        thread.start()
        thread.join()
    attention(*args, config=SPARSE)
    assert p.sites == []
    assert "explain says" in str(p)


def test_table_and_json() -> None:
    with profile() as p:
        torch.ops.s2o.attention(*inputs(), site="decoder", **SPARSE.arguments())
    (site,) = json.loads(json.dumps(p.to_dict()))["sites"]
    assert site == dataclasses.asdict(p.sites[0])
    assert "decoder" in str(p) and "1 sparse calls" in str(p)


def test_error_rows_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="error_rows must be at least 0, not -1"), profile(error_rows=-1):
        pass


def test_names_in_traces() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        torch.ops.s2o.attention(*inputs(), site="decoder", **SPARSE.arguments())
        attention(*inputs(), config=SPARSE)
    names = {event.key for event in trace.key_averages()}
    assert {"s2o decoder", "s2o query [2, 2, 20, 8], key [2, 2, 20, 8]"} <= names
