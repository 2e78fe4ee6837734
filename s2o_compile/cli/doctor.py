"""``s2o doctor``."""

from __future__ import annotations

import dataclasses
import json

import typer

from ..testbed.options import Json


def doctor(json_only: Json = False) -> None:
    """Show versions and devices, and what would run sparse here; the exit code is 1 where something is in the way."""
    from rich.console import Console
    from rich.table import Column, Table

    from .._console import Progress

    with Progress().step("Examining"):
        from ..doctor import examine

        checks = examine()
    if json_only:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        name, found = Column(overflow="fold"), Column("found", overflow="fold")
        table = Table("", name, found, "", title="s2o doctor", title_justify="left")
        for check in checks:
            table.add_row("ok" if check.passed else "[bold red]no", check.name, check.found, check.advice)
        Console().print(table)
    if not all(check.passed for check in checks):
        raise typer.Exit(1)
