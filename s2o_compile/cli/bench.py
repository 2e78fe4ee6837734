"""``s2o bench``: the benchmarks as commands, each imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

BENCHMARKS = {
    "calibration": "calibration",
    "frontier": "frontier",
    "generation": "generation",
    "prefill": "prefill.__main__",
    "quality": "quality.__main__",
    "speed": "speed.__main__",
}
"""The modules of `benchmarks` that a command runs the `main` of, by the command's name."""


class _Benchmarks(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(BENCHMARKS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in BENCHMARKS:
            return None
        module = importlib.import_module(f"s2o_compile.benchmarks.{BENCHMARKS[cmd_name]}")
        benchmark = typer.Typer(add_completion=False)
        benchmark.command(cmd_name)(module.main)
        return typer.main.get_command(benchmark)


bench = typer.Typer(cls=_Benchmarks, name="bench")


@bench.callback()
def group() -> None:
    """Benchmarks of speed and of what is lost."""
