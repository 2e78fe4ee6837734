"""The comparison of generated tokens."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generation import CACHES, FIRST, WAYS, Row, choose_ways, compare, generate, measure
from s2o_compile._console import UsageError
from s2o_compile.ops import S2OConfig

from ..passes.models import tiny, tokens

EXACT = S2OConfig(threshold=0, min_length=1)
"""Sparse where queries are many, as in real use."""
NEW = 6
COMPILED = [
    "dynamic compiled",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("static padded compiled", "chunks beams compiled")),
]
"""Each cache once, and each kind of batch."""


@pytest.mark.parametrize("name", [*(name for name in WAYS if "compiled" not in name), *COMPILED])
def test_threshold_zero_generates_what_dense_attention_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Inductor makes of graphs is not looked at here, and takes it a minute.
    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda module, inputs, **_: module.forward)
    monkeypatch.setitem(CACHES, "chunks", {"prefill_chunk_size": 50})
    model, done = tiny("llama", layers=1), []
    for parameter in model.parameters():
        # Larger than what models start with, so that what is generated depends on attention.
        parameter.data.normal_(std=0.3)
    before = model.forward
    prompts = [tokens(length, batch=1)[0].tolist() for length in (90, 120)]
    with torch.no_grad():
        (row,) = measure(model, prompts, WAYS[name], [EXACT], NEW, lambda: done.append(name))
    sequences = 4 if "padded" in name else 2
    assert row == Row(name, 0, sequences, equal=sequences, first=sequences)
    assert len(done) == 4, "two prompts, dense and sparse"
    assert model.forward == before


def test_padding_changes_nothing() -> None:
    model, prompt = tiny("llama").requires_grad_(False), tokens(80, batch=1)[0].tolist()
    alone = [generate(model, part, WAYS["dynamic"], NEW) for part in (prompt, prompt[20:])]
    assert torch.equal(generate(model, prompt, WAYS["dynamic padded"], NEW), torch.cat(alone))


def test_sequences_are_counted() -> None:
    want = torch.arange(3 * 20).view(3, 20)
    got = want.clone()
    got[0, FIRST] += 1
    got[1, FIRST - 1] += 1
    assert compare([got[:1], got[1:]], [want[:1], want[1:]], "dynamic", 0.5) == Row("dynamic", 0.5, 3, equal=1, first=2)


def test_unknown_ways() -> None:
    assert choose_ways([]) == list(WAYS.values())
    with pytest.raises(UsageError, match=r"--only must be one of 'dynamic', .*, not 'paged'"):
        choose_ways(["static", "paged"])
