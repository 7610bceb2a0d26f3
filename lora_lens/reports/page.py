"""A page of text, tables and figures in one HTML file that needs nothing else: no scripts, no network."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Iterable
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lens._base.errors import ExistingFileError, InputError, MissingFileError
from lora_lens._base.validate import instance
from lora_lens.plots._style import house_style

MISSING = "-"
SHORT = 32  # characters of a row's name that stay on one line
LOOK = """
:root { color-scheme: light; }
body { max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; color: #1c1c1c; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid #1c1c1c; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { max-width: 46rem; margin: .5rem 0; }
.date { color: #5a5a5a; }
.beside { display: flex; flex-wrap: wrap; column-gap: 2.5rem; align-items: flex-start; }
.wide { overflow-x: auto; margin: 1rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #3c3c3c; padding-bottom: .4rem; }
th, td { padding: .22rem .7rem; border-bottom: 1px solid #e0e0e0; text-align: right; vertical-align: top; }
th { font-weight: 500; }
thead th { border-top: 1px solid #1c1c1c; border-bottom: 1px solid #1c1c1c; vertical-align: bottom; }
tbody tr:last-child > * { border-bottom: 1px solid #1c1c1c; }
th:first-child, .words { text-align: left; }
td.number, .short { white-space: nowrap; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { display: block; width: 100%; max-width: 46rem; height: auto; }
figcaption { color: #3c3c3c; font-size: .875rem; max-width: 46rem; }
@page { size: A4; margin: 16mm 14mm; }
@media print {
  body { max-width: none; margin: 0; padding: 0; font-size: 9.5pt; }
  table { font-size: 8pt; }
  th, td { padding: .15rem .4rem; }
  .wide { overflow: visible; }
  h1, h2, h3, caption { break-after: avoid; }
  thead { display: table-header-group; }
  figure, tr { break-inside: avoid; }
  figure img { max-width: 122mm; }
  p, li { orphans: 3; widows: 3; }
}
"""


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(texts: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(text)}</li>" for text in texts) + "\n</ul>"


def beside(tables: Iterable[str]) -> str:
    """Tables next to each other, as far as they fit."""
    return '<div class="beside">\n' + "\n".join(tables) + "\n</div>"


def html_table(cells: pd.DataFrame, caption: str, words: Collection[str] = ()) -> str:
    """A table of texts; the first column names the rows, numbers stand to the right.

    Args:
        cells: one column per column, of texts.
        words: the columns, after the first, that hold words.
    """
    kinds = ["words" if column in words else "number" for column in cells.columns[1:]]
    head = "".join(
        f'<th scope="col" class="{kind}">{escape(str(column))}</th>'
        for column, kind in zip(cells.columns, ["words", *kinds], strict=True)
    )
    rows = [
        f'<tr><th scope="row"{_kept_whole(name)}>{escape(name)}</th>'
        + "".join(f'<td class="{k}">{escape(value)}</td>' for k, value in zip(kinds, values, strict=True))
        + "</tr>"
        for name, *values in cells.itertuples(index=False, name=None)
    ]
    return (
        f'<div class="wide"><table>\n<caption>{escape(caption)}</caption>\n<thead><tr>{head}</tr></thead>\n'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div>"
    )


def _kept_whole(name: str) -> str:
    return ' class="short"' if len(name) <= SHORT else ""


def figure(draw: Callable[..., Axes], alt: str, caption: str, height: float = 4.2) -> str:
    """A picture as an SVG inside the page: ``draw(ax=ax)`` draws it; ``alt`` tells it to who cannot see it.

    Args:
        height: in inches, of 7.6 in width.
    """
    stream = io.BytesIO()
    with house_style(), matplotlib.rc_context({"svg.hashsalt": "lora_lens"}):  # same picture, same bytes
        canvas = Figure(figsize=(7.6, height))  # not pyplot's, which would keep it open
        draw(ax=canvas.subplots())
        canvas.savefig(stream, format="svg", metadata={"Date": None})
    data = base64.b64encode(stream.getvalue()).decode()
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}">\n'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def html_page(title: str, parts: Iterable[str], generator: str) -> str:
    """The whole document; ``generator`` says in its head what made it."""
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{_generator(generator)}\n<title>{escape(title)}</title>\n<style>{LOOK}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )
    return page.replace("<title>", f"{_seal(page)}<title>", 1)  # tells a page that somebody edits later


def page_path(path: str | Path, generator: str) -> Path:
    """``path``, after making sure that a page may be written there.

    Raises:
        ValueError: its name does not end in .html.
        FileNotFoundError: its folder does not exist.
        FileExistsError: a folder is there, or a file that ``generator`` did not make, or not like that.
        TypeError: it is no path.
    """
    path = Path(instance(path, (str, os.PathLike), "path", "the file to write, such as 'report.html'"))
    if path.is_dir():
        raise ExistingFileError(
            f"{path} is a folder; give the name of a file in it, such as {path}/report.html"
        )
    if path.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"the page is an HTML file, so its name must end in .html, not {path.name!r}")
    if not path.parent.is_dir():
        raise MissingFileError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    if path.exists():
        page = path.read_text(encoding="utf-8", errors="replace")
        if _generator(generator) not in page:
            raise ExistingFileError(
                f"{path} was not written by {generator}, so it stays; choose another name"
            )
        seal = re.search(r'<meta name="sha256" content="\w+">\n', page)
        if seal and _seal(page.replace(seal[0], "", 1)) != seal[0]:
            raise ExistingFileError(
                f"{path} was edited since it was written, so it stays; choose another name"
            )
    return path


def points(share: float) -> str:
    """0.1234 -> "12.3": a share in percentage points."""
    return decimal(100 * share)


def decimal(value: float, digits: int = 1) -> str:
    if pd.isna(value):
        return MISSING
    return f"{round(value, digits) + 0.0:.{digits}f}"  # adding 0 turns -0.0 into 0.0


def plain(value: float) -> str:
    """0.00001 rather than 1e-05, with up to six significant digits."""
    if pd.isna(value):
        return MISSING
    return np.format_float_positional(float(f"{value:.6g}"), trim="-")


def with_interval(value: float, low: float, high: float, show: Callable[[float], str] = points) -> str:
    """ "12.3 (11.0 to 13.9)", or the value alone where it has no interval."""
    return show(value) if pd.isna(low) else f"{show(value)} ({show(low)} to {show(high)})"


def _seal(page: str) -> str:
    return f'<meta name="sha256" content="{hashlib.sha256(page.encode()).hexdigest()}">\n'


def _generator(name: str) -> str:
    return f'<meta name="generator" content="{escape(name)}">'
