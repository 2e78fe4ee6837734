"""The zoo's command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from s2o_compile.cli.options import check_file

from ..command import run
from . import report
from .architectures import ARCHITECTURES, calls
from .compare import examine


def row(name: str, implementation: str, scenario: str) -> report.Row:
    """One call; a table of all models goes on where one of them fails."""
    architecture = ARCHITECTURES[name]
    call = report.Row(name, architecture.family, implementation, scenario, architecture.expected_sites(scenario))
    try:
        outcome = examine(architecture, implementation, scenario)
    except Exception as error:
        return dataclasses.replace(call, error=f"{type(error).__name__}: {error}")
    refused = [{"location": site.location, "reason": site.reason} for site in outcome.refused]
    return dataclasses.replace(call, found=len(outcome.decisions), refused=refused, difference=outcome.difference)


def main(
    only: Annotated[list[str] | None, typer.Option(help="An architecture; repeatable, all by default.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Also write the rows there.")] = None,
    as_markdown: Annotated[Path | None, typer.Option("--markdown", help="Also write a Markdown table there.")] = None,
) -> None:
    """Compile tiny models of many architectures and report what happens to their attention."""
    unknown = set(only or ()) - set(ARCHITECTURES)
    if unknown:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}; known are {', '.join(ARCHITECTURES)}")
    for path in filter(None, (as_json, as_markdown)):
        check_file(path)
    pending = list(calls(only or ARCHITECTURES))
    rows = [row(*call) for call in track(pending, "Compile", transient=True, console=Console(stderr=True))]
    Console().print(report.table(rows), report.totals(rows))
    if as_json:
        as_json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))
    if as_markdown:
        as_markdown.write_text(report.markdown(rows))


if __name__ == "__main__":
    run(main)
