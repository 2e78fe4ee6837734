"""Attention of real model code: every site is rewritten, the output stays, no mask is left."""

from __future__ import annotations

import pytest
import torch

from .capture import EXACT, Capture, capture
from .models import NAMES, padding, tiny, tokens

LENGTH = 40


def assert_no_mask_left(captured: Capture) -> None:
    """No boolean tensor over queries and keys is left in the graphs."""
    for node in captured.nodes():
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and value.dtype == torch.bool and value.dim() >= 2:
            assert value.shape[-2] == 1 or value.dim() == 2, node.format_node()


QUICK = [(None, False), ("left", True)]
"""Of all architectures; of the first all but padding on the right."""


@pytest.mark.parametrize(
    ("name", "side", "dynamic"),
    [
        pytest.param(
            name,
            side,
            dynamic,
            marks=[pytest.mark.slow] * ((name != NAMES[0] or side == "right") and (side, dynamic) not in QUICK),
        )
        for name in NAMES
        for side in (None, "left", "right")
        for dynamic in (False, True)
    ],
)
def test_every_site_is_rewritten(name: str, side: str | None, dynamic: bool) -> None:
    model, ids, mask = tiny(name), tokens(LENGTH), padding(LENGTH, side)
    captured, output = capture(model, ids, attention_mask=mask, dynamic=dynamic)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(output[0][real], expected[0][real], atol=1e-4, rtol=1e-4)
    assert [decision.rewritten for decision in captured.decisions] == [True, True]
    assert_no_mask_left(captured)
    terms = ["causal, offset 0"] * (name != "bert") + ["key padding from input attention_mask"] * (side is not None)
    assert captured.decisions[0].mask == ("; ".join(terms) or "everything")


def test_layers_share_their_padding() -> None:
    captured, _ = capture(tiny("llama"), tokens(LENGTH), attention_mask=padding(LENGTH, "left"))
    first, second = (node.kwargs["key_padding"] for node in captured.operators())
    assert first is second


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_sequences(dynamic: bool) -> None:
    model, ids = tiny("llama"), tokens(LENGTH)
    positions = torch.cat([torch.arange(15), torch.arange(LENGTH - 15)]).expand(len(ids), -1)
    captured, output = capture(model, ids, position_ids=positions, use_cache=False, dynamic=dynamic)
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert {decision.mask for decision in captured.decisions} == {
        "causal, offset 0; documents from the result of cumsum"
    }


def test_names_and_locations() -> None:
    captured, _ = capture(tiny("llama"), tokens(LENGTH))
    assert [decision.name for decision in captured.decisions] == [
        "model.layers.0.self_attn",
        "model.layers.1.self_attn",
    ]
    module, function = captured.decisions[0].location.split(" > ")
    assert module.startswith("modeling_llama.py:")
    assert function.startswith("sdpa_attention.py:")


def test_a_chunk_that_continues_a_cache() -> None:
    model, ids = tiny("llama"), tokens(LENGTH)
    with torch.no_grad():
        expected = model(ids).logits[:, 30:]
        cache = model(ids[:, :30], use_cache=True).past_key_values
    captured, output = capture(model, ids[:, 30:], past_key_values=cache)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    assert {decision.mask for decision in captured.decisions} == {"causal, offset 30"}


def test_short_calls_stay_dense() -> None:
    captured, _ = capture(tiny("llama"), tokens(LENGTH), config=type(EXACT)())
    assert {decision.rewritten for decision in captured.decisions} == {False}
    assert "40 queries over 40 keys are too few to gain" in captured.decisions[0].reason


def test_unknown_lengths_are_left_to_the_operator() -> None:
    model, ids = tiny("llama"), tokens(LENGTH)
    captured, output = capture(model, ids, config=type(EXACT)(), dynamic=True)
    assert {decision.rewritten for decision in captured.decisions} == {True}
    with torch.no_grad():
        torch.testing.assert_close(output.logits, model(ids).logits, atol=1e-4, rtol=1e-4)
