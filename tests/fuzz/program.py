"""A random program: choices that render to Python source, which is what runs and what a failure is reported as."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_HEADER = """import math

import torch
from torch import nn
from torch.nn import functional as F
"""

_TAIL = """
import s2o_compile

for sizes in CALLS:
    torch._dynamo.reset()
    with MODE():
        expected = program(**inputs(*sizes))
        compiled = torch.compile(program, backend="s2o", dynamic=DYNAMIC, options={"min_length": 0, "threshold": 0.0})
        torch.testing.assert_close(compiled(**inputs(*sizes)), expected, equal_nan=True)
"""


@dataclass(frozen=True)
class Program:
    """The source of a function named `program` and of its inputs, and how it is to be called.

    Attributes:
        sizes: B, H, G (heads of keys), D (channels) and E (value channels), and the dtype.
        inputs: An expression over these, L and S (queries and keys) for each input.
        setup: Lines of the module.
        body: Lines of the function.
        transform: The name of a functorch transform of it, or "".
        calls: L and S of each call of one compiled function.
        mode: "no_grad", "inference_mode", "enable_grad" or "training", in which floating inputs require gradients.
        dynamic: What ``torch.compile`` is told.
        level: "graph" runs the rewritten graph, "aot" what AOTAutograd makes of it, "inductor" compiles it.
        settings: "exact" (threshold 0), "sparse" or "default".
        features: All choices but the first of each kind.
    """

    sizes: str
    inputs: tuple[tuple[str, str], ...]
    setup: tuple[str, ...]
    body: tuple[str, ...]
    transform: str
    calls: tuple[tuple[int, int], ...]
    mode: str
    dynamic: bool | None
    level: str
    settings: str
    features: frozenset[str]

    @property
    def is_half(self) -> bool:
        """Whether anything is rounded to half precision."""
        return bool(self.features & {"dtype: float16", "dtype: bfloat16", "autocast"})

    @property
    def source(self) -> str:
        """The module."""
        names = ", ".join(name for name, _ in self.inputs)
        values = "\n".join(f"    {name} = {value}" for name, value in self.inputs)
        function = f"def {'model' if self.transform else 'program'}({names}):"
        lines = [
            _HEADER,
            self.sizes,
            *self.setup,
            "\n",
            "def inputs(L, S):",
            "    torch.manual_seed(L)",
            values,
            f"    return dict({', '.join(f'{name}={name}' for name, _ in self.inputs)})",
            "\n",
            function,
            *(f"    {line}" for line in self.body),
        ]
        if self.transform:
            lines += ["\n", f"def program({names}):", textwrap.indent(TRANSFORMS[self.transform], "    ")]
            lines = [line.replace("REST", ", ".join(f"{name}={name}" for name, _ in self.inputs)) for line in lines]
        return "\n".join(lines) + "\n"

    @property
    def script(self) -> str:
        """The module, and a comparison with what it computes uncompiled."""
        mode = "torch.enable_grad" if self.mode == "training" else f"torch.{self.mode}"
        tail = _TAIL.replace("CALLS", repr(self.calls)).replace("MODE", mode).replace("DYNAMIC", repr(self.dynamic))
        return self.source + tail

    def __repr__(self) -> str:
        return f"# {self.mode}, {self.level}, {self.settings}\n{self.script}"


TRANSFORMS = {
    "vmap": "return torch.func.vmap(lambda q: model(**{**dict(REST), 'q': q}))(torch.stack([q, q * 0.5]))",
    "vmap of all": (
        "mapped = {name: torch.stack([x, x.flip(0)]) for name, x in dict(REST).items() if torch.is_tensor(x)}\n"
        "rest = {name: x for name, x in dict(REST).items() if not torch.is_tensor(x)}\n"
        "return torch.func.vmap(lambda mapped: model(**mapped, **rest))(mapped)"
    ),
    "grad": "return torch.func.grad(lambda q: model(**{**dict(REST), 'q': q}).square().sum())(q)",
    "vjp": (
        "y, pull = torch.func.vjp(lambda q: model(**{**dict(REST), 'q': q}), q)\nreturn y, pull(torch.ones_like(y))[0]"
    ),
    "jvp": "return torch.func.jvp(lambda q: model(**{**dict(REST), 'q': q}), (q,), (torch.ones_like(q),))",
}

Choose = Callable[[Sequence[Any]], Any]


@dataclass
class Sketch:
    """A program while it is drawn.

    Attributes:
        choose: Draws one of several values.
        edits: A change in place is made at one place in so many.
    """

    choose: Choose
    inputs: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)
    features: set[str] = field(default_factory=set)
    indent: str = ""
    edits: int = 8

    def pick(self, kind: str, options: Mapping[str, str] | Sequence[Any]) -> Any:
        """One of several options, or of the values of a mapping; all but the first are features of the program.

        Names that end with "?" are those of near misses, and drawn a third as often.
        """
        names = [name for name in options for _ in range(1 if str(name).endswith("?") else 3)]
        name = self.choose(names)
        if name != names[0]:
            self.features.add(f"{kind}: {name}")
        return options[name] if isinstance(options, Mapping) else name

    def has(self, kind: str) -> bool:
        """Whether something else than the first option of a kind was picked."""
        return any(feature.startswith(f"{kind}: ") for feature in self.features)

    def rarely(self, kind: str, times: int = 4) -> bool:
        """Whether to do what most programs do not: once in so many."""
        chosen = self.choose(range(times)) == times - 1
        if chosen:
            self.features.add(kind)
        return chosen

    def line(self, *lines: str) -> None:
        """Add lines to the function."""
        self.body += [self.indent + line for line in lines]

    def input(self, name: str, value: str) -> str:
        """Add an input."""
        self.inputs.setdefault(name, value)
        return name
