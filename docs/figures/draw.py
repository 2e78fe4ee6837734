"""The figures of the documentation, on what SmolLM2 really attends: 8,192 tokens of Python's standard library.

python docs/figures/draw.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from s2o_compile import S2OConfig
from s2o_compile._console import Progress
from s2o_compile.ops.geometry import BLOCK
from s2o_compile.plots import heat_map
from s2o_compile.sdpa_intercept import SdpaInputs, SdpaIntercept
from s2o_compile.testbed.predict import prefill_inputs
from s2o_compile.testbed.prepare import prepare_prefill
from s2o_compile.view.head import HeadView, view_head
from s2o_compile.view.results import LayerFigures
from s2o_compile.view.visits import Visit, visits
from s2o_compile.view.visualize import compare

FOLDER = Path(__file__).parent
LENGTH = 8192
LAYER, HEAD = 10, 4
CONFIG = S2OConfig(min_length=0)
SURE, SAMPLED, LEFT_OUT = "#c1272d", "#0072b2", "#b0b0b0"


def main() -> None:
    """Prefill a document, compare each layer with the operator, and draw."""
    progress = Progress()
    model, document = prepare_prefill(None, LENGTH, None, "cpu", "float32", progress)
    layers: list[LayerFigures] = []
    chosen: list[SdpaInputs] = []

    def look(call: SdpaInputs) -> torch.Tensor:
        dense = call.dense()
        layers.append(compare(call, dense, CONFIG))
        if call.index == LAYER:
            chosen.append(call)
        update(done=len(layers), total=model.config.num_hidden_layers)
        return dense

    with progress.step("Comparing each layer") as update, torch.no_grad(), SdpaIntercept(look):
        model(**prefill_inputs(document, model.device))
    with progress.step("Drawing"):
        call = chosen[0]
        density, error = layers[LAYER].density[HEAD], layers[LAYER].error[HEAD]
        save(visited(view_head(call, HEAD, CONFIG), density, error), "visited.png")
        save(ranking(last_visit(call)), "ranking.png")
        mean = sum(map(sum, (layer.density for layer in layers))) / sum(len(layer.density) for layer in layers)
        title = f"Density of SmolLM2 at {LENGTH:,} tokens, mean {mean:.3f}"
        save(heat_map([layer.density for layer in layers], title, "density (1 is dense)"), "density.png")


def save(figure: Figure, name: str) -> None:
    """Write a figure beside this script."""
    figure.savefig(FOLDER / name, dpi=110)


def last_visit(call: SdpaInputs) -> Visit:
    """What the last segment of the chosen head visits."""
    tensors = (call.query, call.key, call.value)
    return list(visits(*tensors, HEAD, call.is_causal, call.scale, CONFIG))[-1]


def visited(head: HeadView, density: float, error: float) -> Figure:
    """Dense attention of one head, and the share of it that is visited, in blocks of 64 by 64."""
    blocks = head.by_position
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    mass = blocks.mass.masked_fill(blocks.visited.isnan(), math.nan)
    _map(figure, left, mass, LogNorm(1e-5, 1, clip=True), "cividis", "softmax mass of a query in the block")
    _map(figure, right, blocks.visited, LogNorm(1e-2, 1, clip=True), "magma_r", "share of the block's pairs visited")
    left.set_title("What dense attention gives its weight to", fontsize=10)
    right.set_title(f"What s2o visits: density {density:.3f}, relative error {error:.0e}", fontsize=10)
    left.set_ylabel("query position")
    return figure


def _map(figure: Figure, axes: Axes, blocks: torch.Tensor, norm: LogNorm, colours: str, label: str) -> None:
    extent = (0, blocks.shape[1] * BLOCK, blocks.shape[0] * BLOCK, 0)
    image = axes.imshow(blocks.numpy(), cmap=colours, norm=norm, interpolation="nearest", extent=extent)
    axes.set_xlabel("key position")
    axes.set_xticks(range(0, LENGTH + 1, 2048))
    axes.set_yticks(range(0, LENGTH + 1, 2048))
    figure.colorbar(image, label=label, shrink=0.8)


def ranking(visit: Visit) -> Figure:
    """The history of one segment: importance by position, and the same keys in order of importance."""
    positions = visit.order[visit.dense :]
    sure = visit.sure - visit.dense
    listed = visit.visited.any(0)[positions]
    importance = visit.importance.exp().clamp_max(1)
    rank = torch.arange(len(positions))
    kinds = [
        (~listed, LEFT_OUT, f"not visited: {int((~listed).sum()):,}"),
        (listed & (rank >= sure), SAMPLED, f"drawn, and weighs more: {int(listed[sure:].sum()):,}"),
        (listed & (rank < sure), SURE, f"sure to be visited: {sure:,}"),
    ]
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, x in ((left, positions), (right, rank + 1)):
        for which, colour, label in kinds:
            axes.plot(x[which], importance[which], ".", markersize=2.5, color=colour, label=label, rasterized=True)
        axes.axhline(CONFIG.threshold, color="black", linewidth=0.8, linestyle="--", label="threshold")
    low, high = int(visit.order[: visit.dense].min()), int(visit.order[: visit.dense].max())
    left.axvspan(low, high, color="#f0c040", label=f"dense span: {visit.dense:,}")
    left.set(yscale="log", ylim=(1e-8, 1.5), xlabel="key position", ylabel="importance: largest share of any query")
    right.set(xscale="log", xlabel="place in the order of importance")
    left.set_title(f"Keys of queries {visit.rows.start:,} to {visit.rows.stop - 1:,}", fontsize=10)
    right.set_title("The same, in order", fontsize=10)
    left.legend(*_reversed(left), fontsize=7, loc="lower left", markerscale=3)
    return figure


def _reversed(axes: Axes) -> tuple[list[Any], list[str]]:
    handles, labels = axes.get_legend_handles_labels()
    return handles[::-1], labels[::-1]


if __name__ == "__main__":
    main()
