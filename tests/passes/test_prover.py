"""The prover is sound: whatever it makes of a mask is what the mask says, for random masks of its grammar."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from s2o_compile.passes import Decision, rewrite

from ..examples import examples
from .capture import EXACT, inputs

BATCH, HEADS, ROWS, COLUMNS = 2, 3, 7, 9
SHAPE = (BATCH, HEADS, ROWS, COLUMNS)


@dataclass
class Vectors:
    """What a mask may depend on."""

    pad: torch.Tensor
    row_ids: torch.Tensor
    column_ids: torch.Tensor
    square: torch.Tensor

    @classmethod
    def random(cls, seed: int) -> Vectors:
        generator = torch.Generator().manual_seed(seed)
        steps = [torch.randint(0, 2, (BATCH, length), generator=generator) for length in (ROWS, COLUMNS)]
        pad = torch.rand(BATCH, COLUMNS, generator=generator) < 0.6
        square = torch.rand(BATCH, 1, ROWS, COLUMNS, generator=generator) < 0.6
        return cls(pad, steps[0].cumsum(-1), steps[1].cumsum(-1), square)


Build = Callable[[Vectors], torch.Tensor]


def i() -> torch.Tensor:
    return torch.arange(ROWS)[:, None]


def j() -> torch.Tensor:
    return torch.arange(COLUMNS)


def h() -> torch.Tensor:
    return torch.arange(HEADS)[:, None, None]


INTEGERS: list[Build] = [
    lambda v: i(),
    lambda v: j(),
    lambda v: i() - j(),
    lambda v: (i() - j()).abs(),
    lambda v: torch.arange(2, COLUMNS + 2),
    lambda v: j() // 3,
    lambda v: (i() + 1) // 3,
    lambda v: j() % 4,
    lambda v: h() * 2,
    lambda v: i() - h(),
    lambda v: 2 * i() - j(),
    lambda v: v.row_ids[:, None, :, None],
    lambda v: v.column_ids[:, None, None, :],
    lambda v: v.column_ids[torch.arange(BATCH)[:, None, None, None], j()],
    lambda v: (v.column_ids[:, None, None, :] + j()) // 2,
    lambda v: torch.ones(COLUMNS, dtype=torch.long).cumsum(-1),
    lambda v: torch.zeros((), dtype=torch.long),
]
PREDICATES: list[Build] = [
    lambda v: j() <= i(),
    lambda v: j() < i() + 2,
    lambda v: i() - j() < 4,
    lambda v: (i() - j()).abs() <= 2,
    lambda v: v.pad[:, None, None, :],
    lambda v: ~v.pad[:, None, None],
    lambda v: v.pad[torch.arange(BATCH)[:, None, None, None], j()[None, None, None]],
    lambda v: v.pad[:, None, :ROWS, None],
    lambda v: v.pad[0],
    lambda v: v.square,
    lambda v: v.square.transpose(0, 1)[0][:, None],
    lambda v: v.row_ids[:, None, :, None] == v.column_ids[:, None, None, :],
    lambda v: torch.cat([torch.ones(ROWS, 2, dtype=torch.bool), torch.ones(ROWS, 7, dtype=torch.bool).tril()], 1),
    lambda v: torch.ones(ROWS, COLUMNS).tril(1).bool(),
    lambda v: torch.full((ROWS, COLUMNS), -math.inf).triu(1) == 0,
    lambda v: torch.where(j() > i(), -1e9, 0.0) == 0,
    lambda v: torch.zeros(ROWS, COLUMNS).masked_fill(j() > i() + 1, 1.0) < 0.5,
]
COMPARISONS = [torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne]


@st.composite
def comparisons(draw: Any) -> Build:
    left, right = draw(st.sampled_from(INTEGERS)), draw(st.sampled_from(INTEGERS))
    compare, shift = draw(st.sampled_from(COMPARISONS)), draw(st.integers(-3, 3))
    return lambda v: compare(left(v) + shift, right(v))


def joined(inner: st.SearchStrategy[Build]) -> st.SearchStrategy[Build]:
    def join(form: Callable[[Any, Any], Any], left: Build, right: Build) -> Build:
        return lambda v: form(left(v), right(v))

    def negate(build: Build) -> Build:
        return lambda v: ~build(v)

    forms = st.sampled_from([operator.and_, operator.and_, operator.or_, torch.logical_and, torch.eq])
    return st.builds(join, forms, inner, inner) | inner.map(negate)


def predicates() -> st.SearchStrategy[Build]:
    return st.recursive(comparisons() | st.sampled_from(PREDICATES), joined, max_leaves=5)


class Proof(torch.fx.Interpreter):
    """A backend that rewrites a graph and keeps the arguments that the operator then gets."""

    __name__ = "proof"

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.arguments: dict[str, Any] = {}

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.decisions += rewrite(module, EXACT)
        super().__init__(module)
        return self.run

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.target is not torch.ops.s2o.attention.default:
            return super().run_node(n)
        args, self.arguments = self.fetch_args_kwargs_from_env(n)
        return args[0]


def said(arguments: dict[str, Any]) -> torch.Tensor:
    """Which keys the operator's arguments let each query see."""
    seen = torch.ones(SHAPE, dtype=torch.bool)
    distance = i() + arguments["causal_offset"] - j()
    if arguments["is_causal"]:
        seen &= distance >= 0
    if "window" in arguments:
        assert arguments["window"] >= 1
        seen &= distance < arguments["window"]
    if "key_padding" in arguments:
        assert arguments["key_padding"].shape == (BATCH, COLUMNS)
        seen &= arguments["key_padding"][:, None, None]
    if "query_documents" in arguments:
        rows, columns = arguments["query_documents"], arguments["key_documents"]
        assert (rows.shape, columns.shape) == ((BATCH, ROWS), (BATCH, COLUMNS))
        seen &= rows[:, None, :, None] == columns[:, None, None]
    if "mask" in arguments:
        assert arguments["mask"].dtype == torch.bool
        seen &= arguments["mask"]
    return seen


def prove(build: Build, seed: int, dynamic: bool = False) -> tuple[Decision, torch.Tensor | None, torch.Tensor]:
    """The decision on attention under a mask, which keys the operator would show, and which the mask shows."""
    torch._dynamo.reset()
    vectors = Vectors.random(seed)

    def attend(q: Any, k: Any, v: Any, *tensors: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=build(Vectors(*tensors)).expand(SHAPE))

    proof = Proof()
    args = inputs(BATCH, HEADS, ROWS, COLUMNS)
    with torch.no_grad():
        torch.compile(attend, backend=proof, dynamic=dynamic)(*args, *vars(vectors).values())
    (decision,) = proof.decisions
    return decision, said(proof.arguments) if decision.rewritten else None, build(vectors).expand(SHAPE)


@settings(max_examples=examples(60))
@given(predicates(), st.integers(0, 2**16), st.booleans())
def test_what_is_proven_is_what_the_mask_says(build: Build, seed: int, dynamic: bool) -> None:
    decision, found, expected = prove(build, seed, dynamic)
    if found is None:
        assert "hides" in decision.reason or "may be none" in decision.reason or "more conditions" in decision.reason
    else:
        assert torch.equal(found, expected), decision.mask


@pytest.mark.parametrize("build", PREDICATES)
def test_every_predicate_is_proven(build: Build) -> None:
    decision, found, expected = prove(build, seed=0)
    assert found is not None, decision.reason
    assert torch.equal(found, expected)
