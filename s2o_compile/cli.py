"""The command line: ``s2o demo``."""

from __future__ import annotations

import ast
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .demo import Results
    from .ops.config import S2OConfig

app = typer.Typer(help="Sparse long-context attention as a torch.compile backend.", add_completion=False)


class UsageError(Exception):
    """An option has a value that cannot be used."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"s2o-compile {version('s2o-compile')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def group(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Sparse long-context attention as a torch.compile backend."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def demo(
    length: Annotated[int, typer.Option(help="Tokens to prefill.")] = 8192,
    document: Annotated[
        Path | None, typer.Option(help="A text file to read; Python's standard library by default.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A transformers model, by path or hub id; default SmolLM2-135M-Instruct."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Share of a query's softmax mass below which keys no longer matter.")
    ] = None,
    min_length: Annotated[int | None, typer.Option(help="Calls with fewer keys run dense.")] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other field of S2OConfig; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    repeats: Annotated[int | None, typer.Option(help="Timed prefills of each; 1 on a CPU, 5 on a GPU.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the hidden values.")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for the picture and the JSON.")] = Path("s2o-demo"),
    json_only: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Prefill a long document with dense and with sparse attention and compare time and answers."""
    from .demo import Progress, Settings, run_demo

    config = read_config(threshold, min_length, option or [])
    settings = Settings(length, document, model, config, device, dtype, repeats, seed)
    make_folder(output)
    results = run_demo(settings, Progress())
    _save(results, output)
    _print(results, output, json_only)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user did wrong is one sentence on stderr and exit code 2.

    Args:
        arguments: Instead of the process's own.
    """
    try:
        code = app(arguments, prog_name="s2o", standalone_mode=False)
    except Exception as error:
        message = _user_message(error)
        if message is None:
            raise
        print(f"s2o: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code or 0)


def _user_message(error: Exception) -> str | None:
    """One sentence for what the user can change; None for a defect of the program."""
    if hasattr(error, "format_message"):
        return error.format_message()
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("s2o_compile"):
        return f"The demo needs the package {error.name}: pip install 's2o-compile[demo]'."
    demo_errors = sys.modules.get("s2o_compile.demo.errors")
    if demo_errors is not None and isinstance(error, demo_errors.DemoError):
        return str(error)
    return "There is not enough memory: use a smaller --length." if _is_out_of_memory(error) else None


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def read_config(threshold: float | None, min_length: int | None, options: list[str]) -> S2OConfig:
    """The settings that a command line asks for; `options` are NAME=VALUE.

    Raises:
        UsageError: An option is unknown or has a value that is not allowed.
    """
    from .ops.config import S2OConfig

    fields = dict(map(_read_option, options))
    fields |= {
        name: value for name, value in (("threshold", threshold), ("min_length", min_length)) if value is not None
    }
    try:
        return S2OConfig.from_options(fields)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{error}.") from error


def _read_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--option takes NAME=VALUE, not {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing.

    Raises:
        UsageError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be made: {error.strerror}.") from error


def _save(results: Results, folder: Path) -> None:
    from .demo.report import save_json, save_picture

    save_json(results, folder / "demo.json")
    if results.density is not None:
        save_picture(results, folder / "density.png")


def _print(results: Results, folder: Path, json_only: bool) -> None:
    from rich.console import Console

    from .demo.report import print_report

    if json_only:
        print(json.dumps(results.as_dict(), indent=2))
        return
    print_report(results, Console())
    picture = " and density.png" if results.density is not None else ""
    print(f"\nSaved demo.json{picture} in {folder}.")


if __name__ == "__main__":
    main()
