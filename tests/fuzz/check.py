"""Runs a program uncompiled, under s2o and without it, and says whether they differ."""

from __future__ import annotations

import linecache
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch._dynamo.backends.debugging import aot_eager
from torch.utils import _pytree as pytree

from s2o_compile.ops import Ranking, S2OConfig, dense
from s2o_compile.passes import rewrite

from .program import Program

SETTINGS = {
    "exact": S2OConfig(threshold=0, min_length=0, ranking=Ranking(segment=16, near_keys=0, rule="dropped")),
    "sparse": S2OConfig(threshold=0.02, min_length=0, ranking=Ranking(segment=16, near_keys=0)),
    "default": S2OConfig(),
}
LEAVES = ("q", "k", "v", "qkv")
"""The inputs that require gradients in training."""
PLAIN = {"graph": "eager", "aot": "aot_eager", "inductor": "inductor"}


@dataclass
class Verdict:
    """What became of a program.

    Attributes:
        kind: "same", "raises" (as uncompiled), "lenient" (what raises uncompiled does not), "theirs" (wrong without s2o
            too), or what is wrong.
        message: Details.
        rewritten: Sites that became the operator.
        refused: The reason of each other site.
    """

    kind: str = "same"
    message: str = ""
    rewritten: int = 0
    refused: list[str] = field(default_factory=list)

    @property
    def is_fault(self) -> bool:
        """Whether s2o is to blame."""
        return self.kind not in ("same", "raises", "lenient", "theirs")


@dataclass
class Rewriting:
    """A backend that rewrites graphs and runs them, through AOTAutograd or as they are."""

    program: Program
    verdict: Verdict
    __name__ = "rewriting"

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        for decision in rewrite(module, SETTINGS[self.program.settings], fuse_dense=True):
            self.verdict.rewritten += decision.rewritten
            self.verdict.refused += [] if decision.rewritten else [decision.reason]
        return aot_eager(module, inputs) if self.program.level == "aot" else module.forward


@dataclass
class Outcome:
    """What calls of a program gave and left behind."""

    outputs: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    gradients: list[Any] = field(default_factory=list)
    error: Exception | None = None


def load(program: Program) -> dict[str, Any]:
    """The module of a program, with a source that tracebacks can show."""
    source, name = program.source, f"<program {hash(program.source)}>"
    module = sys.modules["program"] = ModuleType("program")
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    torch.manual_seed(0)
    exec(compile(source, name, "exec"), vars(module))
    return vars(module)


def execute(program: Program, compiled: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Outcome:
    """Call a program as it says, on fresh inputs."""
    outcome = Outcome()
    training = program.mode == "training"
    mode = torch.enable_grad if training else getattr(torch, program.mode)
    try:
        module = load(program)
        function = compiled(module["program"])
        for sizes in program.calls:
            inputs = module["inputs"](*sizes)
            tensors = [x for x in pytree.tree_leaves(inputs) if torch.is_tensor(x)]
            leaves = [inputs[name].requires_grad_() for name in LEAVES if training and name in inputs]
            torch.manual_seed(1)
            with mode():
                result = function(**inputs)
            outputs = pytree.tree_leaves(result)
            if training:
                loss = sum(x.square().sum() for x in outputs if torch.is_tensor(x) and x.requires_grad)
                if torch.is_tensor(loss):
                    loss.backward()
            outcome.outputs += outputs
            outcome.inputs += tensors
            outcome.gradients += [x.grad for x in leaves]
            outcome.outputs.append(list(_aliases(outputs, tensors)))
    except Exception as error:
        outcome.error = error
    return outcome


def _aliases(outputs: list[Any], inputs: list[torch.Tensor]) -> Iterator[tuple[int, int]]:
    """The pairs of outputs and inputs that share memory."""
    tensors = [x for x in outputs if torch.is_tensor(x)] + inputs
    memory = [x.untyped_storage().data_ptr() if x.numel() else -n for n, x in enumerate(tensors)]
    for n, one in enumerate(memory):
        yield from ((n, m) for m in range(n) if memory[m] == one)


def difference(program: Program, want: Outcome, got: Outcome) -> tuple[str, str] | None:
    """The kind and the details of a difference, if there is one."""
    if got.error is not None or want.error is not None:
        if got.error is not None and want.error is not None:
            return None
        name = "lenient" if got.error is None else type(got.error).__name__
        return name, str(got.error or want.error)
    for kind in ("outputs", "inputs", "gradients"):
        for one, other in zip(getattr(want, kind), getattr(got, kind), strict=True):
            found = _difference(program, one, other)
            if found:
                return f"{kind}: {found[0]}", found[1]
    return None


def _difference(program: Program, want: Any, got: Any) -> tuple[str, str] | None:
    if not torch.is_tensor(want):
        return None if want == got else ("value", f"{got} instead of {want}")
    if not torch.is_tensor(got):
        return "type", f"{got} instead of a tensor"
    for name in ("shape", "dtype", "requires_grad"):
        if getattr(want, name) != getattr(got, name):
            return name, f"{getattr(got, name)} instead of {getattr(want, name)}"
    if program.level == "graph" and not program.transform and 0 not in want.shape:
        strides = [[step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1] for x in (want, got)]
        if strides[0] != strides[1]:
            return "strides", f"{got.stride()} instead of {want.stride()} of {tuple(want.shape)}"
    want, got = want.detach().double(), got.detach().double()
    known = want.isfinite()
    # Rows that see nothing are NaN in a softmax, and zeros here.
    if not known.any():
        return None
    if not got[known].isfinite().all():
        return "not finite", f"{int((~got[known].isfinite()).sum())} of {want.numel()}"
    error, size = (got - want)[known], want[known].abs().max()
    if program.settings == "sparse":
        relative = float(error.norm() / want[known].norm().clamp_min(1e-3))
        return ("inaccurate", f"relative error {relative:.2g}") if relative > 1 else None
    if float(error.abs().max()) > (6e-2 if program.is_half else 2e-4) * (1 + float(size)):
        return "values", f"off by {float(error.abs().max()):.2g} of {float(size):.2g}"
    return None


def check(program: Program) -> Verdict:
    """Run a program uncompiled and under s2o; where they differ, without s2o too."""
    verdict = Verdict()

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {"backend": Rewriting(program, verdict)}
        if program.level == "inductor":
            options = {"backend": "s2o", "options": SETTINGS[program.settings].to_dict()}
        return torch.compile(function, dynamic=program.dynamic, **options)

    def plain(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=program.dynamic, backend=PLAIN[program.level])

    # Programs are too short for masks that are worth avoiding.
    avoiding = patch.object(dense, "LARGE_MASK", 0 if program.settings == "default" else dense.LARGE_MASK)
    with warnings.catch_warnings(), avoiding:
        warnings.simplefilter("ignore")
        torch._dynamo.reset()
        want = execute(program, lambda function: function)
        found = difference(program, want, execute(program, compiled))
        if found:
            torch._dynamo.reset()
            exact = replace(program, settings="exact")
            theirs = difference(exact, want, execute(exact, plain))
            verdict.kind, verdict.message = ("theirs", f"{found[0]}: {found[1]}") if theirs else found
        elif want.error is not None:
            verdict.kind, verdict.message = "raises", f"{type(want.error).__name__}: {want.error}"
    return verdict
