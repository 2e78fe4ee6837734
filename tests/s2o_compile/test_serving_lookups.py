"""Lookups in a long prompt through transformers' engine, at the default threshold: whole, and cut into parts."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import s2o_compile
from s2o_compile.testbed.document import build_document, read_texts
from s2o_compile.testbed.model import SMOLLM2_PACKAGE, load_model

from . import test_continuous_batching as batching

LENGTH = 8192
"""Tokens of the document: all positions of the model."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(importlib.util.find_spec(SMOLLM2_PACKAGE) is None, reason=f"needs {SMOLLM2_PACKAGE}")
def test_cut_prompts_find_what_the_model_alone_does() -> None:
    model, tokenizer = load_model(None, torch.device("cpu"), torch.float32)
    model.set_attn_implementation("s2o")
    document = build_document(tokenizer, read_texts(None), LENGTH)
    tokens = torch.tensor([document.tokens])
    before = torch.tensor([place - 1 for asked in document.end for place in asked])
    with torch.no_grad(), s2o_compile.profile(error_rows=0) as alone:
        likeliest = model(tokens, use_cache=False, logits_to_keep=before).logits[0].argmax(-1)
    right = (likeliest == tokens[0, before + 1]).split([len(asked) for asked in document.end])
    assert batching.sparse_calls(alone) == model.config.num_hidden_layers
    found = [asked for asked, each in zip(document.end, right, strict=True) if each.all()]
    assert found, "the model alone finds nothing"
    asked = found[-1]
    prompt, value = document.tokens[: asked.start], document.tokens[asked.start : asked.stop]
    for budget in (LENGTH, 1000):
        engine = {"num_blocks": LENGTH // 16 + 1, "max_batch_tokens": budget, "safety_margin": 0.0}
        with s2o_compile.profile(error_rows=0) as profile:
            answers = batching.generate(model, [prompt], len(value), **engine)
        assert answers == [value], f"parts of up to {budget}"
        assert batching.sparse_calls(profile) >= model.config.num_hidden_layers
