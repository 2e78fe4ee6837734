"""A number for each layer and head, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def heat_map(grid: list[list[float]], title: str, label: str, log: bool = False) -> Figure:
    """Draw a heat map; layers may have different numbers of heads.

    Args:
        grid: The numbers, by layer and head.
        title: Above the picture.
        label: What the colours mean.
        log: Whether colours are logarithmic; without, or where nothing is above 0, they start at 0.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    heads = max(map(len, grid))
    filled = [[*row, *[float("nan")] * (heads - len(row))] for row in grid]
    figure = Figure(figsize=(max(4.0, 1.8 + 0.32 * heads), max(3.0, 1.4 + 0.2 * len(grid))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # One lightness ramp: reads the same in grey.
    norm = LogNorm() if log and any(value > 0 for row in grid for value in row) else Normalize(vmin=0)
    image = axes.imshow(filled, cmap="cividis", aspect="auto", norm=norm, interpolation="nearest")
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label=label)
    return figure
