"""The zoo's command line."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from s2o_compile._console import UsageError
from s2o_compile.testbed.options import Json, check_file, check_names
from s2o_compile.writing import write_text

from ..command import run
from ..results import as_text, record
from . import report
from .architectures import ARCHITECTURES, calls
from .compare import examine
from .diffusion import DIFFUSION, MISSING

ALL = ARCHITECTURES | DIFFUSION
"""Every model by name, those of diffusers last."""


def row(name: str, implementation: str, scenario: str) -> report.Row:
    """One call; a table of all models goes on where one of them fails."""
    architecture = ALL[name]
    call = report.Row(name, architecture.family, implementation, scenario, architecture.expected_sites(scenario))
    try:
        outcome = examine(architecture, implementation, scenario)
    except Exception as error:
        return dataclasses.replace(call, error=f"{type(error).__name__}: {error}")
    refused = [{"location": site.location, "reason": site.reason} for site in outcome.refused]
    return dataclasses.replace(call, found=len(outcome.decisions), refused=refused, difference=outcome.difference)


def main(
    only: Annotated[list[str] | None, typer.Option(help="An architecture; repeatable, all by default.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="A file for the table as Markdown, too.")] = None,
    as_json: Json = False,
) -> None:
    """Compile tiny models of many architectures and report what happens to their attention."""
    check_names("--only", only or (), ALL)
    if MISSING and set(only or ()) & set(DIFFUSION):
        raise UsageError(MISSING)
    names = only or (ARCHITECTURES if MISSING else ALL)
    if markdown:
        check_file(markdown)
    if MISSING and not only:
        print(MISSING, file=sys.stderr)
    pending = list(calls({name: ALL[name] for name in names}))
    rows = [row(*call) for call in track(pending, "Compile", transient=True, console=Console(stderr=True))]
    if markdown:
        write_text(markdown, report.markdown(rows))
    if as_json:
        key = ("architecture", "implementation", "scenario")
        found = list(map(dataclasses.asdict, rows))
        print(as_text(record("zoo", found, key, report.MEASURES, torch.device("cpu"), {})))
    else:
        Console().print(report.table(rows), report.totals(rows))


if __name__ == "__main__":
    run(main)
