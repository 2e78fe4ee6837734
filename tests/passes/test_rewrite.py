"""What is rewritten, what is refused and why, and that the rest of the graph stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from s2o_compile import S2OConfig
from s2o_compile.ops.break_even import BreakEven
from s2o_compile.passes.report import module_path

from .capture import EXACT, Capture, capture, inputs


def refusal(function: Callable[..., Any], *args: Any, config: S2OConfig = EXACT) -> str:
    """The reason why the only site of a function stays dense; its result must stay too."""
    captured, output = capture(function, *args, config=config)
    torch.testing.assert_close(output, function(*args))
    decision = captured.only()
    assert not decision.rewritten
    assert not captured.operators()
    return decision.reason


@pytest.mark.parametrize("is_causal", [False, True])
def test_arguments(is_causal: bool) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, None, 0.0, is_causal, scale=0.3)

    args = inputs(queries=20, keys=33)
    captured, output = capture(attend, *args)
    torch.testing.assert_close(output, attend(*args))
    (node,) = captured.operators()
    assert node.kwargs["is_causal"] is is_causal
    assert node.kwargs["causal_offset"] == 0
    assert node.kwargs["scale"] == 0.3
    assert {name: node.kwargs[name] for name in EXACT.arguments()} == EXACT.arguments()


def test_grouped_heads() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, is_causal=True, enable_gqa=True)

    q, _, _ = inputs(heads=6)
    _, k, v = inputs(heads=2)
    captured, output = capture(attend, q, k, v)
    torch.testing.assert_close(output, attend(q, k, v))
    assert captured.only().rewritten


def test_output_that_is_viewed() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v).view(4, 20, 8)

    args = inputs()
    expected = attend(*(x.clone() for x in args))
    captured, output = capture(attend, *args)
    torch.testing.assert_close(output, expected)
    assert captured.only().rewritten


def test_the_rest_of_the_graph_stays() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor) -> Any:
        state.add_(1)
        state[0] = 7
        mask = torch.arange(20)[None] <= torch.arange(20)[:, None]
        return sdpa(q, k, v, attn_mask=mask), mask.sum(), state * 2

    args, states = inputs(), [torch.zeros(3), torch.zeros(3)]
    expected = attend(*args, states[0])
    captured, output = capture(attend, *args, states[1])
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(states[1], states[0])
    assert captured.only().rewritten


def test_a_mask_with_other_users_stays() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        mask = torch.ones(20, 20, dtype=torch.bool).tril()
        return sdpa(q, k, v, attn_mask=mask), mask

    captured, (_, mask) = capture(attend, *inputs())
    assert captured.only().rewritten
    assert torch.equal(mask, torch.ones(20, 20, dtype=torch.bool).tril())


def test_rows_without_keys_are_zero() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=pad[:, None, None, :])

    pad = torch.zeros(2, 20, dtype=torch.bool)
    captured, output = capture(attend, *inputs(), pad)
    assert captured.only().rewritten
    assert torch.equal(output, torch.zeros_like(output))


def test_a_mask_beside_is_causal() -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return sdpa(q, k, v, attn_mask=mask, is_causal=True)

    args = *inputs(), torch.rand(20, 20) < 0.7
    if torch.__version__ < "2.14":
        assert "exclude each other" in refusal(attend, *args)
    else:
        with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True"):
            capture(attend, *args)


def test_refuses_dropout() -> None:
    captured, _ = capture(lambda q, k, v: sdpa(q, k, v, dropout_p=0.5), *inputs())
    assert "dropout" in captured.only().reason


def test_refuses_gradients() -> None:
    captured = Capture()
    args = [x.requires_grad_() for x in inputs()]
    output = torch.compile(lambda q, k, v: sdpa(q, k, v), backend=captured)(*args)
    assert "torch.no_grad()" in captured.only().reason
    output.sum().backward()
    captured, _ = capture(lambda q, k, v: sdpa(q, k, v) + 0, *args)
    assert captured.only().rewritten


def test_refuses_dtypes() -> None:
    assert "float64" in refusal(lambda *x: sdpa(*x), *(x.double() for x in inputs()))


def test_refuses_wide_heads() -> None:
    assert "320 channels" in refusal(lambda *x: sdpa(*x), *inputs(dim=320))


def test_refuses_other_ranks() -> None:
    assert "3 dimensions" in refusal(lambda *x: sdpa(*x), *(x[0] for x in inputs()))


def test_refuses_broadcast_batches() -> None:
    q, _, _ = inputs()
    _, k, v = inputs(batch=1)
    assert "batch" in refusal(lambda *x: sdpa(*x), q, k, v)


def test_heads_that_broadcast() -> None:
    q, _, _ = inputs()
    _, k, v = inputs(heads=1)
    captured, output = capture(lambda *x: sdpa(*x), q, k, v)
    torch.testing.assert_close(output, sdpa(q, k, v))
    assert captured.only().rewritten


def test_refuses_short_calls() -> None:
    assert "20 keys are too few" in refusal(lambda *x: sdpa(*x), *inputs(), config=S2OConfig())


@pytest.mark.parametrize(("window", "seen"), [(None, "1,550"), (100, "98")])
def test_what_a_proven_mask_hides_is_no_work(window: int | None, seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report says what the operator does, and how many keys a query sees."""
    monkeypatch.setattr("s2o_compile.ops.dispatch.break_even", lambda *_: BreakEven(0.0, 2000.0, "a test"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        mask = columns <= rows
        return sdpa(q, k, v, mask if window is None else mask & (rows - columns < window))

    reason = refusal(attend, *inputs(1, 1, 3099), config=S2OConfig())
    assert reason.startswith(f"a query sees too few keys to gain, {seen} on average")


@pytest.mark.skipif(torch.__version__ < "2.12", reason="fake tensors of torch 2.11 refuse what SDPA takes")
def test_refuses_values_of_other_lengths() -> None:
    """SDPA takes them where there are no keys."""
    query, key, value = torch.randn(2, 4, 13, 8), torch.randn(2, 4, 0, 8), torch.randn(2, 4, 8, 0)
    assert "key has 0 positions and value 8" in refusal(lambda *x: sdpa(*x), query, key, value)


def test_other_functions_are_not_attention() -> None:
    captured, _ = capture(lambda q, k: q @ k.transpose(2, 3), *inputs()[:2])
    assert captured.decisions == []


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("L['self'].model.layers.0.attn", "model.layers.0.attn"),
        ("L['self'].model.layers[3].attn", "model.layers.3.attn"),
        ("G['model']._modules['layers']._modules['0']._parameters['weight']", "layers.0.weight"),
        ("L['self']", ""),
    ],
)
def test_names_do_not_depend_on_how_a_model_is_reached(source: str, path: str) -> None:
    assert module_path(source) == path


@pytest.mark.parametrize("queries, keys", [(13, 0), (0, 13), (0, 0)])
def test_heads_of_nothing_are_not_told_apart(queries: int, keys: int) -> None:
    """Products of sizes of 0 do not say which axes a dimension is made of."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.view(2, -1, 4, 8).transpose(1, 2) for x in (query, key, value))
        mask = torch.ones(queries, keys) > 0
        written = (query @ key.mT * 0.3).masked_fill(mask, -torch.inf).softmax(-1) @ value
        key, value = (x[:, :2].repeat_interleave(2, 1) for x in (key, value))
        return written + torch.nn.functional.scaled_dot_product_attention(query, key, value)

    tensors = [torch.randn(2, length, 32) for length in (queries, keys, keys)]
    _, result = capture(attend, *tensors)
    torch.testing.assert_close(result, attend(*tensors))


def test_gradients_that_are_cut_are_not_reached_for() -> None:
    """What is detached is taken as it is, not what it was detached from."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        query, key, value = (x.detach() for x in (query, key, value))
        return (query @ key.mT).softmax(-1) @ value

    tensors = [x.requires_grad_() for x in inputs()]
    captured = Capture()
    torch.testing.assert_close(torch.compile(attend, backend=captured)(*tensors), attend(*tensors))
    assert captured.only().rewritten
