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


def print_report(results: Results, console: Console) -> None:
    """Print every table."""
    console.print(f"\n[bold]{results.model}[/bold], {results.tokens:,} tokens, {results.dtype} on {results.device}")
    console.print(f"Attention sites rewritten: [bold]{results.rewritten} of {len(results.sites)}[/bold]")
    for reason, count in Counter(site.reason for site in results.sites if not site.rewritten).items():
        console.print(f"  {count} kept dense: {reason}")
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
    for name in ("", "dense", "s2o"):
        table.add_column(name, justify="right" if name else "left")
    seconds = {name: statistics.median(times) for name, times in results.seconds.items()}
    runs = len(results.seconds["dense"])
    label = "seconds" if runs == 1 else f"seconds, median of {runs}"
    table.add_row(label, f"{seconds['dense']:.3g}", f"{seconds['s2o']:.3g} ({results.speedup:.2f}x)")
    compiled = results.compile_seconds
    table.add_row("seconds to compile, once", f"{compiled['dense']:.0f}", f"{compiled['s2o']:.0f}")
    density = "not measured" if results.density is None else f"{results.density:.3f}"
    table.add_row("share of attention computed", "1", density)
    perplexity = results.perplexity
    table.add_row(
        f"perplexity, last {results.scored:,} tokens of text",
        f"{perplexity['dense']:.3f}",
        f"{perplexity['s2o']:.3f}",
    )
    for place, lookups in (("in the middle", results.middle), ("at the end", results.end)):
        table.add_row(
            f"hidden values found, asked {place}",
            f"{lookups.dense} of {lookups.asked}",
            f"{lookups.s2o} of {lookups.asked}",
        )
    return table


def _agreement(results: Results) -> Table:
    table = Table(title="s2o against dense", title_justify="left")
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
