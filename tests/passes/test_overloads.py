"""Overloads of PyTorch's operators, as exported graphs call them: read as the functions that a model calls."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx import Graph, GraphModule, Node

from s2o_compile.passes.graph.mutation import Writes
from s2o_compile.passes.graph.read_operations import read_operation
from s2o_compile.passes.mask.prover import Prover

aten = torch.ops.aten


class Program:
    """A graph of calls whose values are known, as after tracing."""

    def __init__(self) -> None:
        self.module = GraphModule({}, Graph())
        self.graph = self.module.graph
        self.rows = self.call(torch.unsqueeze, self.call(torch.arange, 7), 1)
        self.columns = self.call(torch.arange, 9)
        self.mask = self.call(torch.le, self.columns, self.rows)
        self.zero = self.call(torch.zeros, ())
        self.scores = self.placeholder(torch.zeros(2, 3, 7, 9))

    def placeholder(self, value: torch.Tensor) -> Node:
        node = self.graph.placeholder("scores")
        node.meta["example_value"] = value
        return node

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(function, args, kwargs)
        values = (item.meta["example_value"] if isinstance(item, Node) else item for item in args)
        node.meta["example_value"] = function(*values, **kwargs)
        return node

    def number(self, value: torch.Tensor) -> Node:
        """A number as export stores it."""
        self.module.lifted_tensor_0 = value
        node = self.graph.create_node("get_attr", "lifted_tensor_0")
        node.meta["example_value"] = value
        return self.call(aten.lift_fresh_copy.default, node)

    def read(self, node: Node) -> Any:
        prover = Prover(Writes(self.graph.nodes))
        expression = prover.reader.read(node).expression
        assert node in prover.reader.understood
        return expression


@pytest.fixture
def program() -> Program:
    return Program()


MASKS: list[tuple[Any, Callable[..., Any], Callable[[Program], tuple[Any, ...]]]] = [
    (aten.where.ScalarOther, torch.where, lambda p: (p.mask, p.zero, -math.inf)),
    (aten.where.ScalarSelf, torch.where, lambda p: (p.mask, 1.0, p.zero)),
    (aten.where.Scalar, torch.where, lambda p: (p.mask, 0.0, -math.inf)),
    (aten.where.Scalar, torch.where, lambda p: (p.mask, 1, 0)),
    (aten.masked_fill.Scalar, torch.masked_fill, lambda p: (p.zero, p.mask, -math.inf)),
    (aten.add.Scalar, torch.add, lambda p: (p.rows, 2)),
    (aten.sub.Scalar, torch.sub, lambda p: (p.rows, 2)),
    (aten.mul.Scalar, torch.mul, lambda p: (p.rows, 2)),
    (aten.floor_divide.Scalar, torch.floor_divide, lambda p: (p.rows, 2)),
    (aten.remainder.Scalar, torch.remainder, lambda p: (p.rows, 2)),
    (aten.div.Scalar_mode, operator.floordiv, lambda p: (p.rows, 2)),
    (aten.eq.Scalar, torch.eq, lambda p: (p.rows, 2)),
    (aten.ne.Scalar, torch.ne, lambda p: (p.rows, 2)),
    (aten.ge.Scalar, torch.ge, lambda p: (p.rows, 2)),
    (aten.gt.Scalar, torch.gt, lambda p: (p.rows, 2)),
    (aten.le.Scalar, torch.le, lambda p: (p.rows, 2)),
    (aten.lt.Scalar, torch.lt, lambda p: (p.rows, 2)),
    (aten.bitwise_and.Scalar, torch.bitwise_and, lambda p: (p.mask, True)),
    (aten.bitwise_or.Scalar, torch.bitwise_or, lambda p: (p.mask, False)),
    (aten.slice.Tensor, lambda x, *_: x[:, 2:8:2], lambda p: (p.mask, 1, 2, 8, 2)),
    (aten.slice.Tensor, lambda x, *_: x[-3:], lambda p: (p.columns, 0, -3)),
    (aten.select.int, lambda x, *_: x[-1], lambda p: (p.mask, 0, -1)),
]


def written(program: Program, function: Callable[..., Any], args: tuple[Any, ...]) -> Node:
    """The call of a function, or the indexing that it does."""
    if function.__name__ != "<lambda>":
        return program.call(function, *args)
    items: list[Any] = []

    class Indexed:
        def __getitem__(self, item: Any) -> None:
            items.append(item)

    function(Indexed())
    return program.call(operator.getitem, args[0], items[0])


@pytest.mark.parametrize(("overload", "function", "operands"), MASKS, ids=lambda x: getattr(x, "__name__", None))
def test_masks(program: Program, overload: Any, function: Callable[..., Any], operands: Any) -> None:
    args = operands(program)
    options = {"rounding_mode": "floor"} if overload is aten.div.Scalar_mode else {}
    one, other = program.call(overload, *args, **options), written(program, function, args)
    assert torch.equal(one.meta["example_value"], other.meta["example_value"])
    assert program.read(one) == program.read(other)


SCORES: list[tuple[Any, Callable[..., Any], Callable[[Program], tuple[Any, ...]]]] = [
    (aten.where.ScalarOther, torch.where, lambda p: (p.mask, p.scores, -math.inf)),
    (aten.where.ScalarSelf, torch.where, lambda p: (p.mask, -math.inf, p.scores)),
    (aten.masked_fill.Scalar, torch.masked_fill, lambda p: (p.scores, p.mask, -math.inf)),
    (aten.mul.Scalar, torch.mul, lambda p: (p.scores, 0.5)),
    (aten.div.Scalar, torch.div, lambda p: (p.scores, 8)),
    (aten.add.Scalar, torch.add, lambda p: (p.scores, 1.0)),
    (aten.sub.Scalar, torch.sub, lambda p: (p.scores, 1.0)),
]


@pytest.mark.parametrize(("overload", "function", "operands"), SCORES, ids=lambda x: getattr(x, "__name__", None))
def test_scores(program: Program, overload: Any, function: Callable[..., Any], operands: Any) -> None:
    args = operands(program)
    operation = read_operation(program.call(overload, *args))
    assert operation is not None
    assert operation == read_operation(program.call(function, *args))


def test_a_number_that_export_stores(program: Program) -> None:
    number = program.call(aten.detach.default, program.number(torch.tensor(0.0)))
    one = program.call(aten.where.ScalarOther, program.mask, number, -math.inf)
    other = program.call(torch.where, program.mask, 0.0, -math.inf)
    assert program.read(one) == program.read(other)


def test_stored_tensors_with_content(program: Program) -> None:
    """Of several numbers nothing is read, nor of what is no literal."""
    numbers = program.number(torch.tensor([0.0, 1.0]))
    for stored in (numbers, program.call(aten.lift_fresh_copy.default, program.scores)):
        prover = Prover(Writes(program.graph.nodes))
        prover.reader.read(stored)
        assert stored not in prover.reader.understood
