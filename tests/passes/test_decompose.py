"""Attention in modules of torch.nn that Dynamo keeps as one call: what is found, and that the rest stays a call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2o_compile import S2OConfig

from .capture import Capture, capture
from .compare import ENCODER_LAYERS_NEED_A_LENGTH, assert_refused, compare

BATCH, WIDTH, HEADS = 3, 24, 2
LENGTHS = (23, 11, 37, 29, 31)

Call = Callable[..., Tensor]


def attention(**options: Any) -> Call:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options).eval()
    return lambda x, **masks: module(x, x, x, need_weights=False, **masks)[0]


def sequence_first(**options: Any) -> Call:
    module = nn.MultiheadAttention(WIDTH, HEADS, **options).eval()

    def call(x: Tensor, **masks: Any) -> Tensor:
        x = x.transpose(0, 1)
        return module(x, x, x, need_weights=False, **masks)[0]

    return call


def layer(**options: Any) -> Call:
    module = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, **options).eval()

    def call(x: Tensor, attn_mask: Any = None, key_padding_mask: Any = None, is_causal: bool = False) -> Tensor:
        return module(x, src_mask=attn_mask, src_key_padding_mask=key_padding_mask, is_causal=is_causal)

    return call


MODULES: dict[str, Callable[[], Call]] = {
    "attention": attention,
    "sequence first": sequence_first,
    "without bias": lambda: attention(bias=False),
    "other widths": lambda: attention(kdim=WIDTH, vdim=WIDTH),
    "layer": layer,
    "layer, norm first": lambda: layer(norm_first=True),
    "layer, gelu": lambda: layer(activation="gelu"),
}


def hidden(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


def square(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1])


def added(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, -math.inf)


MASKS: dict[str, tuple[str, Callable[[Call, Tensor, Tensor], Tensor]]] = {
    "none": ("everything", lambda call, x, pad: call(x)),
    "padding": ("key padding", lambda call, x, pad: call(x, key_padding_mask=pad)),
    "added padding": ("key padding", lambda call, x, pad: call(x, key_padding_mask=added(pad))),
    "boolean": ("causal, offset 0", lambda call, x, pad: call(x, attn_mask=hidden(x))),
    "added": ("causal, offset 0", lambda call, x, pad: call(x, attn_mask=square(x))),
    "hint": ("causal, offset 0", lambda call, x, pad: call(x, attn_mask=square(x), is_causal=True)),
    "both": (
        "causal, offset 0; key padding",
        lambda call, x, pad: call(x, attn_mask=hidden(x), key_padding_mask=pad),
    ),
}


WHOLE, QUICK = ("attention", "layer"), [("none", False), ("both", True)]
"""Modules of which all cases are quick, and the quick cases of others."""
CASES = [
    pytest.param(name, mask, dynamic, marks=[pytest.mark.slow] * (name not in WHOLE and (mask, dynamic) not in QUICK))
    for name in MODULES
    for mask in MASKS
    for dynamic in (False, True)
]


@pytest.mark.parametrize(("name", "mask", "dynamic"), CASES)
def test_masks(name: str, mask: str, dynamic: bool) -> None:
    call, (proven, apply) = MODULES[name](), MASKS[mask]
    calls = [
        [torch.randn(BATCH, length, WIDTH), torch.arange(length) >= length - torch.arange(BATCH)[:, None]]
        for length in LENGTHS[: None if dynamic else 1]
    ]
    captured = compare(lambda x, pad: apply(call, x, pad), *calls, dynamic=dynamic, atol=1e-5, rtol=1e-4)
    if ENCODER_LAYERS_NEED_A_LENGTH and dynamic and name.startswith("layer"):
        assert captured.decisions == []
        return
    assert len(captured.modules) == 1
    decision = captured.only()
    assert decision.rewritten, decision.reason
    assert decision.mask.split(" from ")[0] == proven


def test_cross_attention_of_a_decoder() -> None:
    module = nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True).eval()
    captured = compare(module, [torch.randn(BATCH, n, WIDTH) for n in (23, 31)], atol=1e-5, rtol=1e-4)
    assert [decision.rewritten for decision in captured.decisions] == [True] * 3
    assert [decision.name for decision in captured.decisions[1:]] == [
        "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]


def test_unbatched() -> None:
    assert compare(sequence_first(), [torch.randn(1, 23, WIDTH)]).only().rewritten


def test_weights_that_are_not_used() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    assert compare(lambda x: module(x, x, x)[0], [torch.randn(BATCH, 23, WIDTH)]).only().rewritten


def test_autocast() -> None:
    call = attention()

    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(x)

    assert compare(function, [torch.randn(BATCH, 23, WIDTH)], atol=3e-2, rtol=3e-2).only().rewritten


def calls_of(captured: Capture) -> list[Any]:
    return [node.target for node in captured.nodes() if node.op == "call_function"]


@pytest.mark.parametrize("average", [False, True])
def test_what_stays_dense_stays_a_call(average: bool) -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS).eval()

    def function(x: Tensor, bias: Tensor) -> Any:
        return module(x, x, x, attn_mask=bias, average_attn_weights=average)

    captured = compare(function, [torch.randn(23, BATCH, WIDTH), torch.randn(23, 23)])
    assert not captured.only().rewritten
    assert calls_of(captured)[0] is F.multi_head_attention_forward
    assert len(captured.nodes()) < 15


def test_short_layers_stay_calls() -> None:
    captured, _ = capture(layer(), torch.randn(BATCH, 23, WIDTH), config=S2OConfig())
    assert "too few" in captured.only().reason
    assert calls_of(captured) == [torch._transformer_encoder_layer_fwd]


def test_active_dropout() -> None:
    module = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, dropout=0.5).train()
    assert_refused(module, [torch.randn(23, BATCH, WIDTH)], reason="dropout is active")


def test_gradients() -> None:
    module, captured = nn.MultiheadAttention(WIDTH, HEADS).train(), Capture()
    x = torch.randn(23, BATCH, WIDTH)
    torch.compile(lambda x: module(x, x, x, need_weights=False)[0], backend=captured)(x).sum().backward()
    assert "torch.no_grad()" in captured.only().reason


def test_through_inductor() -> None:
    call, x = layer(), torch.randn(BATCH, 23, WIDTH)
    compiled = torch.compile(call, backend="s2o", options={"min_length": 0, "threshold": 0}, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), call(x), atol=1e-5, rtol=1e-4)
