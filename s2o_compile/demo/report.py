"""The demo's results for people: tables and a picture."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..plots import heat_map
from ..writing import replacing, write_text
from .results import Lookups, Results

BAR = 30
NAMES = {"eager": "eager", "inductor": "Inductor", "s2o": "s2o"}
"""How the prefills are called in tables."""


def print_report(results: Results, console: Console) -> None:
    """Print every table."""
    console.print(f"\n[bold]{results.model}[/bold], {results.tokens:,} tokens, {results.dtype} on {results.device}")
    console.print(f"Attention sites that are sparse: [bold]{results.rewritten} of {len(results.sites)}[/bold]")
    dense = Counter((site.kind, site.reason) for site in results.sites if not site.rewritten)
    for (kind, reason), count in dense.items():
        console.print(f"  {count} {kind}: {reason}")
    console.print(_comparison(results))
    console.print(_agreement(results))
    if results.density is not None:
        console.print(_densities(results))


def save_json(results: Results, path: Path) -> None:
    """Save everything as JSON."""
    write_text(path, json.dumps(results.as_dict(), indent=2) + "\n")


def save_picture(results: Results, path: Path) -> None:
    """Save a heat map of density by layer and head."""
    grid = [site.density for site in results.sites if site.density]
    title = f"Share of attention computed\n{results.model}, {results.tokens:,} tokens"
    figure = heat_map(grid, title, "density (1 is dense)")
    with replacing(path) as place:
        figure.savefig(place, dpi=150)


def _comparison(results: Results) -> Table:
    table = Table(title="Prefill", title_justify="left")
    for name in ("", *NAMES.values()):
        table.add_column(name, justify="right" if name else "left")
    runs = len(results.seconds["s2o"])
    seconds = {name: f"{statistics.median(times):.3g}" for name, times in results.seconds.items()}
    table.add_row("seconds" if runs == 1 else f"seconds, median of {runs}", *_by_name(seconds))
    table.add_row("s2o is so many times as fast", f"{results.ratio('eager'):.2f}x", f"{results.speedup:.2f}x", "")
    compiled = {name: f"{took:.0f}" for name, took in results.compile_seconds.items()} | {"eager": ""}
    table.add_row("seconds to compile, once", *_by_name(compiled))
    kinds = dict.fromkeys(site.kind for site in results.sites)
    table.add_row("attention", "dense", "dense", "; ".join(kinds))
    density = "1" if results.density is None else f"{results.density:.3f}"
    table.add_row("share of attention computed", "1", "1", density)
    perplexity = {name: f"{value:.3f}" for name, value in results.perplexity.items()}
    table.add_row(f"perplexity, last {results.scored:,} tokens of text", *_by_name(perplexity))
    for place, lookups in (("in the middle", results.middle), ("at the end", results.end)):
        label = f"hidden values found, asked {place}"
        table.add_row(label, "", f"{lookups.dense} of {lookups.asked}", f"{lookups.s2o} of {lookups.asked}")
    return table


def _by_name(cells: dict[str, str]) -> list[str]:
    return [cells[name] for name in NAMES]


def _agreement(results: Results) -> Table:
    table = Table(title="s2o against Inductor, which is dense", title_justify="left")
    table.add_column("")
    table.add_column("same", justify="right")
    table.add_row(f"next token, last {results.scored:,} tokens of text", f"{results.agreement:.1%}")
    for place, lookups in (("in the middle", results.middle), ("at the end", results.end)):
        table.add_row(f"values dense finds {place} that s2o finds", _share(lookups, lookups.dense))
        table.add_row(f"values s2o finds {place} that dense finds", _share(lookups, lookups.s2o))
    return table


def _share(lookups: Lookups, of: int) -> str:
    return f"{lookups.both} of {of}"


def _densities(results: Results) -> Table:
    table = Table(title="Share of attention computed, by layer", title_justify="left")
    for name in ("layer", "mean", "least head", "most head"):
        table.add_column(name, justify="right")
    table.add_column("")
    layers = [(number, site.density) for number, site in enumerate(results.sites) if site.density]
    most = max(statistics.fmean(density) for _, density in layers)
    for number, density in layers:
        mean = statistics.fmean(density)
        bar = "█" * round(BAR * mean / most) if most else ""
        table.add_row(str(number), f"{mean:.3f}", f"{min(density):.3f}", f"{max(density):.3f}", bar)
    return table
