"""What the prover reads of a tensor, written back into the graph, is what the tensor holds, in all dtypes."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy.core.function import AppliedUndef
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from s2o_compile.passes.mask.constants import as_number
from s2o_compile.passes.mask.emit import Emitter
from s2o_compile.passes.mask.expressions import Unreadable, as_choice, axis
from s2o_compile.passes.mask.handlers import HANDLERS
from s2o_compile.passes.mask.reader import Reader

from ..examples import examples

SHAPE = (2, 3, 4, 5)
SHAPES = [SHAPE, (2, 1, 1, 5), (2, 1, 4, 1), (4, 5), (4, 1), (5,), (1,), ()]
REAL = [0.0, -0.0, 0.3, -0.3, 1.0, 2.0, 1e-8, 1e-40, -1e4, 65504.0, 70000.0, 1e9, 2.0**24 + 2, 3e38, 1e300]
FLOATS = [*REAL, math.nan, math.inf, -math.inf]
ENDS = [-(2**63), -(2**31), 2**24 + 1, 2**31 - 1, 2**31, 2**53 + 1, 2**63 - 1]
WHOLE = [0, 1, -1, 2, 3, 127, 128, 255, 256, 2**15, *ENDS]
FLOAT_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.complex64]
SMALL_DTYPES = [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FLOAT_DTYPES, *SMALL_DTYPES, *[torch.int64, torch.int32, torch.bool, torch.float32] * 3]

COMPARISONS = [torch.lt, torch.le, torch.gt, torch.ge, torch.eq, torch.ne, operator.lt, operator.eq]
ARITHMETIC = [torch.add, torch.sub, torch.mul, torch.div, operator.floordiv, torch.remainder, operator.mul]
LOGIC = [operator.and_, operator.or_, torch.logical_and, torch.logical_or, torch.bitwise_and]
ALONE = [torch.logical_not, operator.invert, torch.abs, torch.neg, torch.sqrt, torch.tril, torch.triu, torch.diff]
CASTS = ["bool", "long", "int", "float", "half", "bfloat16"]


class Program:
    """A graph of which each node holds the tensor that it computes."""

    def __init__(self) -> None:
        self.graph = Graph()
        self.nodes: list[Node] = []
        self.inputs: list[Tensor] = []

    def __repr__(self) -> str:
        given = (f"{value.dtype}: {value.tolist()}" for value in self.inputs)
        return "\n".join([str(self.graph), *given])

    def hold(self, node: Node, value: Any) -> None:
        node.meta["example_value"] = value
        self.nodes.append(node)

    def input(self, value: Tensor) -> None:
        self.inputs.append(value)
        self.hold(self.graph.placeholder(f"input{len(self.inputs)}"), value)

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> None:
        """Add a node, unless torch refuses what it computes or it has another shape than the others."""
        held = [arg.meta["example_value"] if isinstance(arg, Node) else arg for arg in args]
        try:
            form = getattr(type(held[0]), target) if isinstance(target, str) else target
            value = form(*held, **kwargs)
            torch.broadcast_to(value, SHAPE)
        except (RuntimeError, TypeError, OverflowError, ZeroDivisionError, AttributeError):
            return
        create = self.graph.call_method if isinstance(target, str) else self.graph.call_function
        self.hold(create(target, args, kwargs), value)


def numbers() -> st.SearchStrategy[Any]:
    return st.sampled_from(FLOATS) | st.sampled_from(WHOLE) | st.integers(-4, 6) | st.booleans()


@st.composite
def tensors(draw: Any) -> Tensor:
    """A tensor of a few nasty values, or of small whole numbers, as documents and flags are."""
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    nasty = FLOATS if dtype in FLOAT_DTYPES else WHOLE
    values = draw(st.lists(st.sampled_from(nasty), min_size=2, max_size=4) | st.just([0, 1, 2]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    place = torch.randint(0, len(values), shape, generator=generator)
    wide = torch.float64 if dtype in FLOAT_DTYPES else torch.int64
    return torch.tensor(values, dtype=wide)[place].to(dtype)


def extend(program: Program, draw: Any) -> None:
    """Add one operation on what there is."""
    one, other = draw(st.sampled_from(program.nodes)), draw(st.sampled_from(program.nodes) | numbers())
    kind = draw(st.sampled_from(["compare", "arithmetic", "logic", "alone", "cast", "to", "fill", "make", "move"]))
    dtype, number = draw(st.sampled_from(DTYPES)), draw(numbers())
    if kind in ("compare", "arithmetic", "logic"):
        forms = {"compare": COMPARISONS, "arithmetic": ARITHMETIC, "logic": LOGIC}[kind]
        program.call(draw(st.sampled_from(forms)), one, other)
    elif kind == "alone":
        program.call(draw(st.sampled_from(ALONE)), one)
    elif kind == "cast":
        program.call(draw(st.sampled_from(CASTS)), one)
    elif kind == "to":
        program.call("to", one, dtype)
        if isinstance(other, Node):
            program.call("type_as", one, other)
    elif kind == "fill":
        condition = draw(st.sampled_from(program.nodes))
        program.call(torch.where, condition, one, other)
        program.call("masked_fill", one, condition, number)
    elif kind == "make":
        program.call(torch.arange, draw(st.sampled_from([4, 5])), dtype=dtype)
        program.call(torch.full, draw(st.sampled_from([(), (5,), (4, 5)])), number, dtype=dtype)
        program.call(torch.ones, (4, 5), dtype=dtype)
        program.call("new_zeros", one, (4, 5))
    else:
        program.call("unsqueeze", one, -1)
        program.call("cumsum", one, -1)
        program.call("clone", one)
        program.call("expand", one, *draw(st.sampled_from(SHAPES[:4])))


@st.composite
def programs(draw: Any) -> Program:
    program = Program()
    for _ in range(draw(st.integers(1, 3))):
        program.input(draw(tensors()))
    for length in SHAPE[-2:]:
        program.call(torch.arange, length)
    for _ in range(draw(st.integers(1, 9))):
        extend(program, draw)
    return program


def written(program: Program, reader: Reader, node: Node) -> Any:
    """A node as it is emitted from what it is read as: a tensor, or a predicate and two numbers; None if not read."""
    try:
        expression = reader.read(node).expression
    except Unreadable:
        return None
    if node not in reader.understood:
        return None
    rank = node.meta["example_value"].dim()
    axes = {axis(place): sympy.Integer(SHAPE[-place]) for place in range(rank, 0, -1)}
    emitter = Emitter(program.graph, reader.leaves, axes, node.next, torch.device("cpu"))
    choice = as_choice(expression)
    if choice is not None:
        is_constant = choice.predicate in (sympy.true, sympy.false)
        where = choice.predicate == sympy.true if is_constant else emitter.predicate(choice.predicate)
        return where, *map(as_number, choice.values)
    if isinstance(expression, AppliedUndef) and not expression.is_integer:
        return emitter.leaf(expression)
    return emitter.integers(expression)


def run(program: Program, output: Any) -> Any:
    end = program.graph.output(output)
    result = GraphModule(torch.nn.Module(), program.graph)(*program.inputs)
    program.graph.erase_node(end)
    return result


def check(program: Program) -> None:
    """Compare all that is read of a program with what it holds."""
    reader = Reader(HANDLERS)
    for node in list(program.nodes):
        emitted = written(program, reader, node)
        if emitted is None:
            continue
        held: Tensor = node.meta["example_value"]
        result = run(program, emitted)
        if isinstance(result, tuple):
            where, *values = result
            # Indexed: not all versions of torch have `where` for all dtypes.
            table = torch.stack([torch.full((), value, dtype=held.dtype) for value in reversed(values)])
            result = table[torch.as_tensor(where).long()]
        found = result.to(held.dtype).expand(held.shape)
        assert same(found, held), f"{node} is read as {reader.read(node).expression}"


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is one."""
    lists = (tensor.to(torch.float64) if tensor.dtype.is_floating_point else tensor for tensor in (one, other))
    left, right = (tensor.flatten().tolist() for tensor in lists)
    return all(x == y or (x != x and y != y) for x, y in zip(left, right, strict=True))


@settings(max_examples=examples(150))
@given(programs())
def test_what_is_read_is_what_is_held(program: Program) -> None:
    check(program)
