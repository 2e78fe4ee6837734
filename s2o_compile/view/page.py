"""The report: one HTML file that refers to nothing outside itself, and the same pictures as PNGs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from ..writing import replacing, write_text
from .errors import ViewError
from .results import View

DPI = 150
PAPER_DPI = 300

_CAPTIONS = {
    "density": "Visited (query, key) pairs over those that a dense kernel visits, padding of blocks included.",
    "error": "Squared difference from dense attention in float32 over the square of dense attention.",
    "by-position": "Attention in blocks of 64 queries and 64 keys, before the permutation. The area of a square is the "
    "share of the block's pairs that are visited.",
    "by-importance": "The same with each segment's keys in the order in which the operator comes to them: its dense "
    "span, then the keys before it by falling importance.",
    "mass": "Dense attention's mass in the first keys of that order, the mean of a segment's queries. A curve begins "
    "after the dense span; the dot is where the segment stops; after it, at most a sample is visited.",
}

_ESCAPES = {ord(character): f"\\u{ord(character):04x}" for character in "<>&"}
"""Of JSON inside an element, which HTML and XML then read alike."""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>$title</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td { border-bottom: 1px solid #ddd; padding: 0.2rem 1.5rem 0.2rem 0; font-variant-numeric: tabular-nums; }
div { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; align-items: start; }
figure { margin: 0; }
img { max-width: 100%; }
figcaption { font-size: 0.85rem; color: #555; }
</style>
</head>
<body>
<h1>$title</h1>
$figures
<h2>All heads</h2>
<div>$heads</div>
<h2>$head</h2>
<div>$near</div>
<h2>Settings</h2>
$settings
<script type="application/json" id="data">$data</script>
</body>
</html>
""")


def save_page(view: View, pictures: dict[str, Figure], path: Path) -> None:
    """Write the report.

    Raises:
        ViewError: The file cannot be written.
    """
    try:
        write_text(path, page(view, pictures))
    except OSError as error:
        raise ViewError(f"output must be a file that can be written, not {path}: {error.strerror}") from error


def save_pngs(pictures: dict[str, Figure], folder: Path) -> None:
    """Write each picture as a PNG, in a resolution for print.

    Raises:
        ViewError: The folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            with replacing(folder / f"{name}.png") as place:
                figure.savefig(place, dpi=PAPER_DPI)
    except OSError as error:
        raise ViewError(f"png must be a folder that can be written to, not {folder}: {error.strerror}") from error


def page(view: View, pictures: dict[str, Figure]) -> str:
    """The report as HTML; its script element ``data`` holds the figures as JSON."""
    images = {name: _image(figure, _CAPTIONS[name]) for name, figure in pictures.items()}
    data = view.as_dict()
    settings = view.config | view.config["ranking"]
    head = f"Layer {view.head.layer}, head {view.head.head}"
    rows = [
        (label, f"{data[name]:.3g}", f"{data['head'][name]:.3g}")
        for label, name in (("density", "density"), ("relative error", "error"))
    ]
    return _PAGE.substitute(
        title=escape(f"{view.model}, {view.queries:,} tokens"),
        figures=_table([("", "mean of all heads", head.lower()), *rows]),
        heads=images["density"] + images["error"],
        head=head,
        near=images["by-position"] + images["by-importance"] + images["mass"],
        settings=_table((name, str(value)) for name, value in settings.items() if name != "ranking"),
        data=json.dumps(data).translate(_ESCAPES),
    )


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def _image(figure: Figure, caption: str) -> str:
    png = io.BytesIO()
    figure.savefig(png, dpi=DPI)
    source, caption = base64.b64encode(png.getvalue()).decode(), escape(caption)
    return f'''<figure><img alt="{caption}" src="data:image/png;base64,{source}"/>
<figcaption>{caption}</figcaption></figure>'''
