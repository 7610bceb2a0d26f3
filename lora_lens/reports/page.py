"""A page of text, tables and pictures in one HTML file that needs nothing else: no scripts, no network.

What it shows is data, and ``templates/report.html.j2`` is how it looks. A page has sections, each a
heading and pieces. A piece is a paragraph (a text), a :class:`Table`, a :func:`picture`, or one of
{"bullets": texts}, {"beside": tables} (next to each other as far as they fit) and {"heading": text} (of the
pieces that follow).
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_lens._base.errors import ExistingFileError, InputError, MissingFileError
from lora_lens._base.validate import instance
from lora_lens.plots._style import house_style

GENERATOR = "lora_lens report"
MISSING = "-"
LOOKS = Environment(
    loader=PackageLoader("lora_lens.reports"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)


class Table(NamedTuple):
    """Its columns by name: the first names the rows, and of the others ``words`` hold no numbers."""

    cells: Mapping[object, Sequence] | pd.DataFrame
    caption: str
    words: Collection[str] = ()

    @property
    def rows(self) -> list[tuple[str, list]]:
        columns = [values for _, values in self.cells.items()]  # a DataFrame has no values()
        return [(name, cells) for name, *cells in zip(*columns, strict=True)]


Piece = str | Table | dict


def picture(draw: Callable[..., Axes], alt: str, caption: str, height: float = 4.2) -> dict[str, str]:
    """An SVG, drawn by ``draw(ax=ax)``, ``height`` inches of 7.6; ``alt`` describes it to screen readers."""
    stream = io.BytesIO()
    with house_style(), matplotlib.rc_context({"svg.hashsalt": "lora_lens"}):  # same picture, same bytes
        canvas = Figure(figsize=(7.6, height))  # not pyplot's, which would keep it open
        draw(ax=canvas.subplots())
        canvas.savefig(stream, format="svg", metadata={"Date": None})
    return {"image": base64.b64encode(stream.getvalue()).decode(), "alt": alt, "caption": caption}


def html_page(title: str, sections: Sequence[Mapping]) -> str:
    """The whole document, of sections with ``heading`` and ``pieces``."""
    look = LOOKS.get_template("report.html.j2")
    page = look.render(title=title, sections=sections, generator=GENERATOR, date=date.today()) + "\n"
    return page.replace("<title>", f"{_seal(page)}<title>", 1)  # an edited page no longer fits it


def page_path(path: str | Path) -> Path:
    """``path``, if a page may be written there: it replaces only a page that nobody has edited."""
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
        page, wrong = path.read_text(encoding="utf-8", errors="replace"), ""
        seal = re.search(r'<meta name="sha256" content="\w+">\n', page)
        if f'<meta name="generator" content="{GENERATOR}">' not in page:
            wrong = f"was not written by {GENERATOR}"
        elif seal and _seal(page.replace(seal[0], "", 1)) != seal[0]:
            wrong = "was edited since it was written"
        if wrong:
            raise ExistingFileError(f"{path} {wrong}, so it stays; choose another name")
    return path


def points(share: float) -> str:
    """0.1234 -> "12.3": a share in percentage points."""
    return decimal(100 * share)


def decimal(value: float, digits: int = 1) -> str:
    return MISSING if pd.isna(value) else f"{round(value, digits) + 0.0:.{digits}f}"  # -0.0 becomes 0.0


def plain(value: float) -> str:
    """0.00001 rather than 1e-05, with up to six significant digits."""
    return MISSING if pd.isna(value) else np.format_float_positional(float(f"{value:.6g}"), trim="-")


def with_interval(value: float, low: float, high: float, show: Callable[[float], str] = points) -> str:
    """ "12.3 (11.0 to 13.9)", or the value alone where it has no interval."""
    return show(value) if pd.isna(low) else f"{show(value)} ({show(low)} to {show(high)})"


def _seal(page: str) -> str:
    return f'<meta name="sha256" content="{hashlib.sha256(page.encode()).hexdigest()}">\n'
