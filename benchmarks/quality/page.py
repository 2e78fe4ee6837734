"""The page of a run: its tables and pictures in one HTML file that refers to nothing outside itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from s2o_compile.writing import write_text

from .picture import depth_picture, flips_picture
from .report import LEGEND, tables
from .run import Outcome

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
WIDTH = 240
"""Characters of a line, so that tables of many methods are not wrapped."""
DEPTH = "Needles found, by their depth in the text before the question and by the length of the text."
FLIPS = "Values lost and gained against dense attention on the same prompts."

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; margin: 2rem; }}
pre {{ font-size: 0.8rem; line-height: 1.25; overflow-x: auto; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; }}
figcaption {{ font-size: 0.85rem; color: #555; max-width: 60rem; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{source}</p>
{figures}
<pre>{tables}</pre>
</body>
</html>
"""


def save_page(outcomes: list[Outcome], title: str, source: str, path: Path) -> None:
    """Write the page; `source` says by what, where and when it was measured."""
    pictures = {DEPTH: depth_picture(outcomes)}
    for length in sorted({outcome.length for outcome in outcomes}):
        pictures[f"{length:,} tokens. {FLIPS}"] = flips_picture(outcomes, length)
    shown = {caption: one for caption, one in pictures.items() if one is not None}
    write_text(path, page(outcomes, title, source, shown))


def page(outcomes: list[Outcome], title: str, source: str, pictures: Mapping[str, Figure]) -> str:
    """The page as HTML; pictures by their captions."""
    text = io.StringIO()
    console = Console(width=WIDTH, file=text)
    for table in tables(outcomes):
        console.print(table, "")
    console.print(LEGEND)
    return _PAGE.format(
        title=escape(title),
        source=escape(source),
        figures="\n".join(_image(figure, caption) for caption, figure in pictures.items()),
        tables=escape(text.getvalue()),
    )


def _image(figure: Figure, caption: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI)
    source, caption = base64.b64encode(png.getvalue()).decode(), escape(caption)
    return f'''<figure><img alt="{caption}" src="data:image/png;base64,{source}"/>
<figcaption>{caption}</figcaption></figure>'''
