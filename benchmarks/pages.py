"""Tables of the documentation, generated from the results in ``benchmarks/results``.

    python -m benchmarks.pages

rewrites every table between two comments of this form, in the README and below ``docs``:

    <!-- table: FILE.json
    where: FIELD=VALUE; ...
    columns: HEADING = TEMPLATE | HEADING = TEMPLATE ...
    across: TEMPLATE
    cell: TEMPLATE
    -->
    <!-- end of table -->

Templates are Python format strings of a row's fields; the result is empty where a row lacks a field, and a field that
none of the rows has is refused. Rows are those that `where` chooses (None stands for a missing field), all without it.
With `across` and `cell`, rows that agree in their columns share a line, whose further cells are headed by what `across`
gives for each row.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from s2o_compile._console import UsageError
from s2o_compile.writing import write_text

from .command import run
from .results import load

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (\S+)\n(.*?)-->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    """The README and all pages of the documentation, without what is generated when the website is built."""
    docs = ROOT / "docs"
    written = [page for page in sorted(docs.rglob("*.md")) if not page.relative_to(docs).parts[0].startswith("_")]
    return [ROOT / "README.md", *written]


def updated(text: str) -> str:
    """A page with its tables as the results have them."""

    def fill(found: re.Match[str]) -> str:
        start, name, spec, end = found.groups()
        return f"{start}{render(load(RESULTS / name)['rows'], read_spec(spec))}\n{end}"

    return TABLE.sub(fill, text)


def read_spec(text: str) -> dict[str, str]:
    """The lines NAME: VALUE of a table's comment; a line that begins with a space continues the one before."""
    lines = re.sub(r"\n\s+", " ", text.strip()).splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def render(rows: Sequence[Mapping[str, Any]], spec: Mapping[str, str]) -> str:
    """A table in Markdown.

    Raises:
        UsageError: A template has a field that none of the rows that are shown has.
    """
    wanted = [pair.strip().split("=", 1) for pair in spec.get("where", "").split(";") if pair.strip()]
    chosen = [row for row in rows if all(str(row.get(name)) == value for name, value in wanted)]
    for template in (spec[name] for name in ("columns", "across", "cell") if name in spec):
        _check_fields(template, chosen)
    columns = [tuple(map(str.strip, column.split("=", 1))) for column in spec["columns"].split("|")]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for place, row in enumerate(chosen):
        left = tuple(fill(template, row) for _, template in columns)
        if "across" in spec:
            lines.setdefault(left, {})[fill(spec["across"], row)] = fill(spec["cell"], row)
        else:
            lines[(*left, str(place))] = {}
    across = list(dict.fromkeys(heading for cells in lines.values() for heading in cells))
    headings = [heading for heading, _ in columns] + across
    body = [[*left[: len(columns)], *(cells.get(heading, "") for heading in across)] for left, cells in lines.items()]
    return "\n".join(_line(cells) for cells in (headings, ["---"] * len(headings), *body))


def _check_fields(template: str, rows: Sequence[Mapping[str, Any]]) -> None:
    known = {name for row in rows for name in row}
    unknown = [name for name in _fields(template) if name not in known]
    if unknown:
        raise UsageError(f"no row has the field {unknown[0]!r} of a table; rows have {', '.join(sorted(known))}.")


def _fields(template: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(template) if name]


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(cell if cell == "---" else f" {cell} " if cell else " " for cell in cells) + "|"


def fill(template: str, row: Mapping[str, Any]) -> str:
    """A template with a row's values; "" where one is missing."""
    return "" if any(row.get(name) is None for name in _fields(template)) else template.format_map(row)


def main() -> None:
    """Rewrite the tables of all pages."""
    for page in pages():
        before = page.read_text(encoding="utf-8")
        after = updated(before)
        if after != before:
            write_text(page, after)
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    run(main)
