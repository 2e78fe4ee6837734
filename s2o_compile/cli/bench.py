"""``s2o bench``: the benchmarks as commands, each imported when it is asked for."""

from __future__ import annotations

import importlib
from typing import Any

import typer
from typer.core import TyperGroup

BENCHMARKS = {
    "calibration": "calibration",
    "distributed": "distributed.__main__",
    "frontier": "frontier",
    "generation": "generation",
    "paper": "paper.__main__",
    "prefill": "prefill.__main__",
    "quality": "quality.__main__",
    "serving": "serving.__main__",
    "speed": "speed.__main__",
}
"""The modules of `benchmarks` that a command runs the `main` of, by the command's name."""
COMMANDS = BENCHMARKS | {"compare": "compare"}
"""The same, with what is done with results."""


class _Benchmarks(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"s2o_compile.benchmarks.{COMMANDS[cmd_name]}")
        benchmark = typer.Typer(add_completion=False)
        benchmark.command(cmd_name)(module.main)
        return typer.main.get_command(benchmark)


bench = typer.Typer(cls=_Benchmarks, name="bench")


@bench.callback()
def group() -> None:
    """Benchmarks of speed and of what is lost."""
