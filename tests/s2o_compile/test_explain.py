"""The report of what the backend does."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile import S2OConfig, attention, explain
from s2o_compile.ops.density import dense_pairs, density
from s2o_compile.passes import Decision

from ..passes.capture import EXACT, Capture, inputs
from ..passes.models import padding, tiny, tokens


def test_rewritten_sites() -> None:
    report = explain(tiny("llama"), tokens(40), attention_mask=padding(40, "left"), config=EXACT)
    assert (report.rewritten, report.dense) == (2, 0)
    first = report.decisions[0]
    assert first.name == "model.layers.0.self_attn"
    assert first.mask == "causal, offset 0; key padding from input attention_mask"
    assert first.shapes["query"] == (2, 4, 40, 8)
    assert first.density is None


def test_dense_sites_say_why() -> None:
    report = explain(tiny("llama"), tokens(40))
    assert (report.rewritten, report.dense) == (0, 2)
    assert "too few" in report.decisions[0].reason
    assert "too few" in str(report)


def test_a_reason_of_many_sites_is_written_once() -> None:
    report = explain(tiny("llama", layers=3), tokens(40))
    assert str(report).count(report.decisions[0].reason) == 1
    assert str(report).count("as above") == 2
    assert all(decision.reason == report.decisions[0].reason for decision in report.decisions)


def test_dense_sites_that_lose_their_mask() -> None:
    ids, mask = tokens(1100), padding(1100, "left")
    model = tiny("llama", layers=1)
    report = explain(model, ids, attention_mask=mask, config=S2OConfig(min_length=4096))
    assert (report.rewritten, report.dense) == (0, 1)
    assert report.decisions[0].kind == "dense, no mask" and "dense, no mask" in str(report)


def test_report_is_json_and_text() -> None:
    report = explain(tiny("llama", layers=1), tokens(40), config=EXACT, measure=True)
    assert json.loads(json.dumps(report.to_dict()))["decisions"][0]["rewritten"] is True
    assert "model.layers.0.self_attn" in str(report)
    assert "1 of 1 attention sites rewritten" in str(report)


def test_measured_density() -> None:
    seen: list[Decision] = []
    model, ids = tiny("llama"), tokens(250)
    report = explain(model, ids, config=EXACT, measure=True, progress=seen.append)
    assert seen == report.decisions
    for decision in report.decisions:
        assert decision.density is not None and len(decision.density) == 4
        assert all(1 <= value < 2 for value in decision.density)
    sparse = dataclasses.replace(EXACT, threshold=0.5)
    fewer = explain(model, ids, config=sparse, measure=True).decisions[0].density
    assert fewer is not None and sum(fewer) < sum(report.decisions[0].density or [])


def test_a_graph_that_runs_twice_is_counted_twice() -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Once()

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            x = self.inner(q, k, v)
            torch._dynamo.graph_break()
            return self.inner(x, k, v)

    class Once(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return sdpa(q, k, v, is_causal=True)

    report = explain(Twice(), *inputs(), config=EXACT, measure=True)
    pairs = dense_pairs(20, 20, True, 0, EXACT.ranking.tile) * 2
    assert sum(decision.dense_pairs or 0 for decision in report.decisions) == 2 * pairs


def test_compiled_models_stay_compiled() -> None:
    model, ids = tiny("gpt2", layers=1), tokens(40)
    captured = Capture()
    compiled = torch.compile(model, backend=captured)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=2):
        compiled(ids)
        for _ in range(3):
            assert explain(compiled, ids, config=EXACT).rewritten == 1
        compiled(ids)
        assert len(captured.modules) == 1
        compiled(ids[:, :30])
    assert len(captured.modules) == 2


def test_model_keeps_its_state() -> None:
    model = tiny("llama").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    explain(model, tokens(40), config=EXACT)
    assert model.training and torch.is_grad_enabled()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_functions_are_explained_too() -> None:
    report = explain(lambda q, k, v: sdpa(q, k, v), *inputs(), config=EXACT)
    assert report.decisions[0].location.startswith("test_explain.py:")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("offset", [-30, 0, 17])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_dense_attention_has_density_one(is_causal: bool, offset: int, window: int | None) -> None:
    config = S2OConfig(min_length=0, threshold=0, last_queries=1024)
    args = inputs(queries=100, keys=170)
    terms = {"is_causal": is_causal, "causal_offset": offset, "window": window}
    result = attention(*args, **terms, config=config, return_stats=True)
    measured = density(result.visited, 100, 170, is_causal, offset, config.ranking.tile, window)
    torch.testing.assert_close(measured, torch.ones(2, 2))
