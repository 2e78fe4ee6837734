"""``python -m tests.fuzz``: random programs and random calls of the operator, for as long as one likes."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print

from s2o_compile.passes.safety import RAISE_ERRORS

from .campaign import Result, run

app = typer.Typer(help=__doc__, add_completion=False)
Seconds = Annotated[float, typer.Option(help="How long to go on.")]
Seed = Annotated[int, typer.Option(help="The first seed; a result that exists is continued instead.")]
Output = Annotated[Path | None, typer.Option(help="A JSON file for counts and faults.")]


def _report(result: Result) -> None:
    for name, count in result.counts.most_common():
        if ": " not in name or name.startswith(("result", "refused", "level")):
            print(f"{count:8} {name}")
    for fault in result.faults:
        print(f"\n# seed {fault.seed}: {fault.kind}\n# {fault.message}".replace("[", "\\["))
        typer.echo(fault.script)
    raise typer.Exit(bool(result.faults))


def _start(seed: int, output: Path | None) -> Result:
    os.environ[RAISE_ERRORS] = "1"
    torch._logging.set_logs(all=logging.CRITICAL)
    torch._C._debug_only_display_vmap_fallback_warnings(False)
    torch.set_num_threads(1)
    return Result.load(output) if output and output.exists() else Result(seed, seed)


@app.command()
def programs(
    seconds: Seconds = 600,
    seed: Seed = 1,
    output: Output = None,
    inductor: Annotated[int, typer.Option(help="Compile each so many with Inductor too; 0 for none.")] = 0,
) -> None:
    """Small models around attention, uncompiled and under s2o."""
    from . import programs

    _report(run(functools.partial(programs.attempt, every=inductor), _start(seed, output), seconds, output))


@app.command()
def calls(
    seconds: Seconds = 600,
    seed: Seed = 1,
    output: Output = None,
    device: Annotated[str, typer.Option(help='"cpu" or "cuda".')] = "cpu",
) -> None:
    """Calls of the operator, against dense attention and against the specification."""
    from . import calls

    _report(run(functools.partial(calls.attempt, device=device), _start(seed, output), seconds, output))


if __name__ == "__main__":
    app()
