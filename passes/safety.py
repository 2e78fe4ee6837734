"""A safeguard for errors in a pass: the graph stays as Dynamo made it, and a warning asks for a report."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import TypeVar

from torch.fx import GraphModule

from .graph.nested import nested_graphs
from .graph.torch_internals import copy_graph

T = TypeVar("T")

RAISE_ERRORS = "S2O_RAISE_ERRORS"
"""The environment variable that lets errors through, for whoever mends them."""


class Safeguard:
    """Keeps the graphs of a module as they are now, to put them back where something fails.

    Args:
        module: The module; the graphs that its graph uses are kept too.
    """

    def __init__(self, module: GraphModule) -> None:
        self._graphs = [(inner, copy_graph(inner.graph)) for inner in nested_graphs(module)]

    def run(self, action: Callable[[], T], otherwise: Callable[[], T], *expected: type[Exception]) -> T:
        """Return what `action` returns or, where it fails, what `otherwise` makes of the graphs as they were.

        An error of `otherwise` comes through: it is not the passes that fail. So do those of `action` that are
        `expected` and, with the environment variable ``S2O_RAISE_ERRORS``, all.
        """
        try:
            return action()
        except expected:
            raise
        except Exception as error:
            self._put_back()
            if os.environ.get(RAISE_ERRORS):
                raise
            result = otherwise()
            _warn(error)
            return result

    def _put_back(self) -> None:
        for inner, graph in self._graphs:
            inner.graph = graph


def _warn(error: Exception) -> None:
    summary = next(iter(str(error).splitlines()), "")
    warnings.warn(
        f"s2o left a graph as it was, as it failed to rewrite it: {type(error).__name__}: {summary}. The model runs as "
        f"with Inductor alone. Please report this with the traceback, which {RAISE_ERRORS}=1 in the environment shows",
        RuntimeWarning,
        stacklevel=2,
    )
