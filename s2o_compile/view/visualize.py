"""Calls a model once and looks at its attention, dense and sparse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .._attention import attention
from ..ops import S2OConfig
from ..ops.density import density
from ..sdpa_intercept import SdpaInputs, SdpaIntercept
from .errors import ViewError
from .head import HeadView, view_head
from .results import LayerFigures, View


def visualize(
    model: Callable[..., Any],
    *args: Any,
    layer: int = 0,
    head: int = 0,
    config: S2OConfig | None = None,
    output: str | Path | None = "report.html",
    png: str | Path | None = None,
    name: str | None = None,
    progress: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> View:
    """Call a model once, under ``torch.no_grad()``, and report what sparse attention does to each head.

    Each layer gets what dense attention computed before it, and runs sparse whatever `min_length` says. Density and
    error are the operator's on the model's device; what the chosen head visits is what the operator visits on a CPU.

    Args:
        model: A module or a function whose attention is SDPA: causal or bidirectional, one sequence, no padding.
        *args: Its positional arguments.
        layer: Which call of attention to look at from near, counted from 0.
        head: Which of its query heads.
        config: The settings of the operator, by default ``S2OConfig()``.
        output: The HTML file to write, which refers to nothing outside; None for none.
        png: A folder for each picture as a PNG; None for none.
        name: Of the model, in the report; by default that of its class.
        progress: Called with the number of layers that are done.
        **kwargs: The model's keyword arguments.

    Returns:
        What the report shows.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        TypeError: `config` has the wrong type.
        ViewError: There is no such layer or head, its attention cannot be viewed, or a file cannot be written.
    """
    from .figures import figures
    from .page import save_page, save_pngs

    for argument, value in (("layer", layer), ("head", head)):
        if value < 0:
            raise ViewError(f"{argument} must be at least 0, not {value}")
    inner = getattr(model, "_orig_mod", model)
    visitor = _Visitor(layer, head, _sparse(S2OConfig.of(config)), progress)
    with torch.no_grad(), SdpaIntercept(visitor) as calls:
        inner(*args, **kwargs)
    if visitor.head_view is None:
        raise ViewError(f"layer must be below {calls.count}, the calls of SDPA that the model makes, not {layer}")
    view = View(
        name or type(inner).__name__, visitor.queries, visitor.config.to_dict(), visitor.layers, visitor.head_view
    )
    pictures = figures(view)
    if output is not None:
        save_page(view, pictures, Path(output))
    if png is not None:
        save_pngs(pictures, Path(png))
    return view


def _sparse(config: S2OConfig) -> S2OConfig:
    """The settings by which all calls run sparse, whatever their length."""
    try:
        return dataclasses.replace(config.resolved(), min_length=0)
    except ValueError as error:
        raise ViewError(str(error)) from error


class _Visitor:
    """Compares each call with the operator, and looks at one head from near."""

    def __init__(self, layer: int, head: int, config: S2OConfig, progress: Callable[[int], None] | None) -> None:
        self.layer, self.head, self.config, self.progress = layer, head, config, progress
        self.queries = 0
        self.layers: list[LayerFigures] = []
        self.head_view: HeadView | None = None

    def __call__(self, call: SdpaInputs) -> torch.Tensor:
        """Look at a call and give its dense output."""
        if not call.is_plain or call.query.shape[0] != 1:
            raise ViewError(f"layer {call.index} cannot be viewed: it attends to several sequences, or has a mask")
        dense = call.dense()
        self.layers.append(compare(call, dense, self.config))
        if call.index == self.layer:
            heads = call.query.shape[1]
            if self.head >= heads:
                raise ViewError(f"head must be below {heads}, the heads of layer {self.layer}, not {self.head}")
            self.queries = call.query.shape[2]
            self.head_view = view_head(call, self.head, self.config)
        if self.progress is not None:
            self.progress(len(self.layers))
        return dense


def compare(call: SdpaInputs, dense: torch.Tensor, config: S2OConfig) -> LayerFigures:
    """Density and error of the operator in place of one call of SDPA, whose output is `dense`."""
    sparse = attention(
        call.query, call.key, call.value, call.is_causal, scale=call.scale, config=config, return_stats=True
    )
    if dense.dtype != torch.float32:
        tensors = {name: getattr(call, name).float() for name in ("query", "key", "value")}
        dense = dataclasses.replace(call, **tensors).dense()
    share = density(sparse.visited, call.query.shape[2], call.key.shape[2], call.is_causal, 0, config.ranking.tile)
    wrong = (sparse.output - dense).square().sum((2, 3)) / dense.square().sum((2, 3))
    return LayerFigures(share[0].tolist(), wrong[0].tolist())
