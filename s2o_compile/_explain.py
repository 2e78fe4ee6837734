"""Explains what the backend does to a model: each attention site, rewritten or kept dense, and why."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .calibration.file import CalibrationError
from .calibration.settings import site_settings
from .ops import Ranking, S2OConfig
from .ops.density import dense_pairs
from .passes.graph.nested import nested_graphs
from .passes.report import Decision, Report
from .passes.rewrite import rewrite
from .passes.safety import Safeguard

_GRAPHS_PER_CODE = 4096


def explain(
    model: Callable[..., Any],
    *args: Any,
    config: S2OConfig | None = None,
    measure: bool = False,
    progress: Callable[[Decision], None] | None = None,
    **kwargs: Any,
) -> Report:
    """Call a model once, under ``torch.no_grad()``, and report what the backend does to its attention.

    The graphs run eagerly with the operator in them. Models that are compiled already stay so.

    Args:
        model: A module or a function.
        *args: Its positional arguments.
        config: The settings of the operator, by default ``S2OConfig()``.
        measure: Whether to count the pairs that each rewritten site visits, also where it would run dense.
        progress: Called with a site's decision each time it was measured.
        **kwargs: The model's keyword arguments.

    Raises:
        TypeError: `config` has the wrong type.
    """
    analysis = _Analysis(S2OConfig.of(config), measure, progress)
    call_once(model, analysis, *args, **kwargs)
    return analysis.report


def call_once(model: Callable[..., Any], backend: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a model under ``torch.no_grad()``, compiled anew by a backend, for these shapes alone."""
    with torch.no_grad(), torch._dynamo.config.patch(_limits()):
        torch.compile(_uncached(model), backend=backend, dynamic=False)(*args, **kwargs)


def replace_operator(
    module: torch.fx.GraphModule, implementation: Callable[[Decision], Callable[..., torch.Tensor]]
) -> None:
    """Let the rewritten sites of a graph, and of those that it calls, run something else than the operator."""
    for graph in nested_graphs(module):
        for node in graph.graph.nodes:
            if "s2o_decision" in node.meta:
                node.target = implementation(node.meta["s2o_decision"])
        graph.recompile()


def _uncached(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a model, with its own code object, as Dynamo keeps graphs by code object."""
    inner = getattr(model, "_orig_mod", model)

    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    code = call.__code__.replace(co_name="explained")
    return types.FunctionType(code, call.__globals__, closure=call.__closure__)


def _limits() -> dict[str, int]:
    names = ("recompile_limit", "accumulated_recompile_limit")
    return {name: max(_GRAPHS_PER_CODE, getattr(torch._dynamo.config, name)) for name in names}


class _Analysis:
    """A backend that records decisions and runs graphs eagerly."""

    __name__ = "s2o_explain"

    def __init__(self, config: S2OConfig, measure: bool, progress: Callable[[Decision], None] | None) -> None:
        self.config, self.measure, self.progress = config, measure, progress
        self.report = Report()

    def __call__(self, module: torch.fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def rewritten() -> list[Decision]:
            return rewrite(module, self.config, site_settings(self.config, module, example_inputs), fuse_dense=True)

        self.report.decisions += Safeguard(module).run(rewritten, list, CalibrationError)
        if self.measure:
            replace_operator(module, self._counted)
        return module.forward

    def _counted(self, decision: Decision) -> Callable[..., torch.Tensor]:
        """The operator, counting its calls as those of one site."""

        def attention(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            output, _, visited = torch.ops.s2o.attention_stats(query, key, *args, **kwargs)
            _count(decision, visited, query, key, kwargs)
            if self.progress is not None:
                self.progress(decision)
            return output

        return attention


def _count(
    decision: Decision, visited: torch.Tensor, query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]
) -> None:
    lengths = query.shape[2], key.shape[2]
    mask = kwargs["is_causal"], kwargs["causal_offset"]
    dense = dense_pairs(*lengths, *mask, Ranking.from_json(kwargs["settings"]).tile, kwargs.get("window"))
    decision.add_measurement(visited.sum((0, 2)).tolist(), dense * query.shape[0])
