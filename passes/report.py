"""The decision on each attention site, with its reason."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

if TYPE_CHECKING:
    from rich.table import Table

_FRAME = re.compile(r'File "(.+?)", line (\d+)')
AS_ABOVE = "as above"
"""What a table says of a site instead of the mask and the reason of the site before it."""
_TORCH = os.path.dirname(torch.__file__) + os.sep


@dataclass
class Decision:
    """The decision on one attention site.

    Attributes:
        name: The module that the site is in, or the node's name in the graph.
        location: 'model.py:45 > attention.py:123', the line in the site's module and the innermost one outside torch.
        shapes: The shapes of query, key and value; symbolic sizes are strings.
        rewritten: Whether the site became ``torch.ops.s2o.attention``.
        reason: Why, in one sentence.
        by_length: Whether a rewritten site chooses sparse or dense at each call, as lengths vary.
        unmasked: Whether a site that stays dense attends what its mask shows without computing the mask.
        mask: What the mask says, as far as it was proven, and what else is done to the logits.
        visited: The (query, key) pairs that each query head visited, over the batch; None if not measured.
        dense_pairs: The pairs that a dense kernel visits for one head, over the batch; None if not measured.
    """

    name: str
    location: str
    shapes: dict[str, tuple[int | str, ...]]
    rewritten: bool
    reason: str
    by_length: bool = False
    unmasked: bool = False
    mask: str = ""
    visited: list[int] | None = None
    dense_pairs: int | None = None

    def __str__(self) -> str:
        outcome = f"{self.kind}; {self.mask}" if self.rewritten else self.kind
        return f"{self.name} ({self.location}): {outcome}; {self.reason}"

    @property
    def kind(self) -> str:
        """'sparse', 'sparse if long', 'dense', or 'dense, no mask'."""
        if self.rewritten:
            return "sparse if long" if self.by_length else "sparse"
        return "dense, no mask" if self.unmasked else "dense"

    @property
    def density(self) -> list[float] | None:
        """Visited pairs over the pairs that a dense kernel visits, per query head; None if not measured."""
        if self.visited is None or self.dense_pairs is None:
            return None
        return [pairs / max(1, self.dense_pairs) for pairs in self.visited]

    def add_measurement(self, visited: list[int], dense_pairs: int) -> None:
        """Count one call of the site; a graph may run several times."""
        before = self.visited or [0] * len(visited)
        self.visited = [old + new for old, new in zip(before, visited, strict=True)]
        self.dense_pairs = (self.dense_pairs or 0) + dense_pairs

    def to_dict(self) -> dict[str, Any]:
        """The fields and the density, in types that JSON has."""
        return {**dataclasses.asdict(self), "density": self.density}


@dataclass
class Report:
    """The decisions of all graphs of a model, in the order of compilation."""

    decisions: list[Decision] = field(default_factory=list)

    @property
    def rewritten(self) -> int:
        """How many sites became the operator."""
        return sum(decision.rewritten for decision in self.decisions)

    @property
    def dense(self) -> int:
        """How many sites were left as they were."""
        return len(self.decisions) - self.rewritten

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        return {
            "rewritten": self.rewritten,
            "dense": self.dense,
            "decisions": [decision.to_dict() for decision in self.decisions],
        }

    @property
    def _title(self) -> str:
        return f"s2o: {self.rewritten} of {len(self.decisions)} attention sites rewritten"

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        """The names of the table's columns, and its rows."""
        measured = any(decision.density is not None for decision in self.decisions)
        columns = ["site", "line", "query", "key", "attention", *["density"] * measured, "mask and reason"]
        rows = [_row(decision, measured) for decision in self.decisions]
        for before, row in reversed(list(itertools.pairwise(rows))):
            if before[-1] and row[-1] == before[-1]:
                row[-1] = AS_ABOVE
        return columns, rows

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self._title)
        columns, rows = self._cells()
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def __str__(self) -> str:
        columns, rows = self._cells()
        return "\n".join([self._title, *_aligned([columns, *rows])])


def _aligned(rows: list[list[str]]) -> list[str]:
    """The rows of a table as lines, with the columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _row(decision: Decision, measured: bool) -> list[str]:
    query, key = (" x ".join(map(str, decision.shapes.get(name, ()))) for name in ("query", "key"))
    density = decision.density
    shown = [f"{sum(density) / len(density):.3f}" if density else "-"] if measured else []
    why = "; ".join(filter(None, (decision.mask, "" if decision.rewritten else decision.reason)))
    return [decision.name, decision.location, query, key, decision.kind, *shown, why]


def site_name(node: Node) -> str:
    """The innermost module that a node comes from, or the node's own name."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    return module_path(list(stack.values())[-1][0]) or node.name


def module_path(source: str) -> str:
    """The path from a model to what Dynamo found in it: 'layers.0' for "L['self']._modules['layers']._modules['0']"."""
    path = re.sub(r"^[LG]\['\w+'\]\.?", "", source)
    path = re.sub(r"\[(?:'([^']+)'|(\d+))\]", lambda match: f".{match[1] or match[2]}", path)
    return re.sub(r"(^|\.)(_?modules|_parameters)(?=\.)", "", path).strip(".")


def source_location(node: Node) -> str:
    """'model.py:45 > attention.py:123', where a node's module computes it and, in another file, where it is computed.

    Lines inside torch do not count; '' if none is known.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    outside = [(path, line) for path, line in frames if not path.startswith(_TORCH)]
    own = [frame for frame in outside if frame[0] == _module_file(node)]
    lines = dict.fromkeys(own[-1:] + outside[-1:])
    return " > ".join(f"{os.path.basename(path)}:{line}" for path, line in lines)


def _module_file(node: Node) -> str | None:
    """The file that defines the class of the innermost module that a node comes from."""
    stack = node.meta.get("nn_module_stack")
    kind = list(stack.values())[-1][1] if stack else None
    return getattr(sys.modules.get(getattr(kind, "__module__", "")), "__file__", None)
