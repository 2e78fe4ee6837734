"""The options that several commands have, and the settings that they ask for."""

from __future__ import annotations

import ast
import dataclasses
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._console import UsageError
from ..writing import check_writable

if TYPE_CHECKING:
    from ..ops.config import S2OConfig

Model = Annotated[
    str | None,
    typer.Argument(help="A transformers model, by path or hub id; default SmolLM2-135M-Instruct."),
]
Document = Annotated[Path | None, typer.Option(help="A text file to read; Python's standard library by default.")]
Length = Annotated[int, typer.Option(help="Tokens to prefill.")]
Threshold = Annotated[
    float | None, typer.Option(help="Share of a query's softmax mass from which a key is always visited.")
]
MinLength = Annotated[int | None, typer.Option(help="Calls with fewer keys run dense; by default their work decides.")]
Fields = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="NAME=VALUE", help="Any other field of S2OConfig, or a field of Ranking; repeatable."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def read_config(
    threshold: float | None, min_length: int | None, options: list[str], given_by: str = "--option"
) -> S2OConfig:
    """The settings that a command line asks for; `options` are NAME=VALUE, given by the option of that name,
    and NAME is a field of `S2OConfig` or of its `Ranking`.

    Raises:
        UsageError: An option is unknown or has a value that is not allowed, or a calibration's file cannot be read.
    """
    from ..ops.config import Ranking, S2OConfig

    fields = dict(_read_option(text, given_by) for text in options)
    names = [field.name for field in dataclasses.fields(Ranking)]
    ranking = {name: fields.pop(name) for name in names if name in fields}
    fields |= {
        name: value for name, value in (("threshold", threshold), ("min_length", min_length)) if value is not None
    }
    try:
        config = S2OConfig.from_options(fields | {"ranking": ranking})
        if config.calibration is not None:
            from ..calibration.file import Calibration

            Calibration.load(config.calibration)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{error}.") from error
    return config


def _read_option(text: str, given_by: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"{given_by} takes NAME=VALUE, not {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def check_names(option: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is none of those that an option takes.

    Raises:
        UsageError: There is one.
    """
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UsageError(f"{option} must be one of {', '.join(map(repr, known))}, not {unknown!r}.")


def make_folder(folder: Path) -> None:
    """Make a folder where it is missing, and refuse one that could not be written into at the end of the work.

    Raises:
        UsageError: It cannot be made, or not be written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be made: {error.strerror}.") from error
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"The folder {folder} cannot be written into: {error.strerror}.") from error


def check_file(path: Path) -> None:
    """Refuse a file that could not be written at the end of the work.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        check_writable(path)
    except OSError as error:
        raise UsageError(f"The file {path} cannot be written: {error.strerror}.") from error
