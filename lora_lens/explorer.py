"""What all explorers are made of: controls, pictures and tables as HTML, and errors said in place."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable
from html import escape
from io import BytesIO

import numpy as np
import pandas as pd
from ipywidgets import HTML, Checkbox, Dropdown, HBox, Layout, VBox
from ipywidgets import Widget as Control
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lora_lens import plots

ALL = ""  # not None, for which ipywidgets shows an empty box
WORDS = {"description_width": "initial"}  # longer descriptions are cut off otherwise
SWEEP_COLUMNS = (
    "method",
    "rank",
    "position",
    "start",
    "lr",
    "seed",
    "accuracy",
    "retained_accuracy",
    "forgetting",
)


def explorer(rows: list[list[Control]], results: list[Control], draw: Callable[[], None]) -> VBox:
    """Rows of controls over a message over results; the first view raises, later ones say what is wrong.

    ``draw`` may change controls itself; that draws nothing again.
    """
    message, shown = HTML(), VBox(results)
    draw()
    drawing = False

    def redraw(_change: object) -> None:
        nonlocal drawing
        if drawing:
            return
        drawing = True
        try:
            draw()
        except ValueError as error:
            message.value = f'<p role="alert"><b>{escape(str(error))}</b></p>'
            shown.layout.display = "none"  # a stale picture would answer another question
        else:
            message.value = ""
            shown.layout.display = None
        finally:
            drawing = False

    for row in rows:
        for control in row:
            control.observe(redraw, "value")
    wrapped = Layout(flex_flow="row wrap", grid_gap="0 12px")
    return VBox([*(HBox(row, layout=wrapped) for row in rows), message, shown])


def dropdown(description: str, options: Iterable[str] = ()) -> Dropdown:
    options = list(options)
    return Dropdown(options=options, index=0 if options else None, description=description)


def offer_with_all(choice: Dropdown, options: list[tuple[str, object]]) -> None:
    """``all`` and ``options``; the value stays if it is among them."""
    options = [("all", ALL), *options]
    if tuple(options) != choice.options:
        kept = choice.value
        choice.options = options
        choice.value = kept if kept in dict(options).values() else ALL


def rate_choice(table: pd.DataFrame) -> Dropdown:
    """The learning rates; at first the one that learns most."""
    learnt = table.groupby("lr")["accuracy"].mean()
    options = [(f"{rate:g}", rate) for rate in learnt.index]
    return Dropdown(options=options, value=learnt.idxmax(), description="learning rate", style=WORDS)


def checkbox(description: str) -> Checkbox:
    return Checkbox(True, description=description, indent=False, layout=Layout(width="max-content"))


def table_box() -> HTML:
    numbers = HTML()
    numbers.add_class("jp-RenderedHTMLCommon")  # so that it looks like every other table of the notebook
    return numbers


def drawn(draw: Callable[[Figure], object], alt: str, size: tuple[float, float] = (8, 4.2)) -> str:
    """A picture of constant size as an HTML image with a text for screen readers.

    Not ipywidgets' Image: that has no alternative text, and its view fails in some versions of
    JupyterLab. Drawn without pyplot, so that no figure stays open.
    """
    with plots.house_style():
        figure = Figure(figsize=size)
        draw(figure)
        png = BytesIO()
        FigureCanvasAgg(figure).print_png(png)
    source = b64encode(png.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{source}" style="max-width: 100%">'


def fixed_axes(figure: Figure) -> Axes:
    """Axes that stay where they are as labels change, without the time that arranging them takes."""
    figure.set_layout_engine("none")
    return figure.add_axes((0.085, 0.14, 0.9, 0.77))


def fixed_row(figure: Figure, count: int, **margins: float) -> np.ndarray:
    """Likewise ``count`` Axes side by side; shape (count,)."""
    figure.set_layout_engine("none")
    places = {"left": 0.065, "right": 0.99, "bottom": 0.15, "top": 0.86, "wspace": 0.17, **margins}
    return figure.subplots(1, count, squeeze=False, gridspec_kw=places)[0]


def html_table(table: pd.DataFrame, rows_in_view: int | None = None) -> str:
    text = table.to_html(index=False, border=0, na_rep="")
    if rows_in_view is None or len(table) <= rows_in_view:
        return text
    height = f"max-height: {2 * rows_in_view}em; overflow: auto"
    return f'<div tabindex="0" role="region" aria-label="table" style="{height}">{text}</div>'


def plain_texts(values: pd.Series) -> list[str]:
    """Numbers and names as short as they can be said; nothing where there is nothing."""
    return ["" if pd.isna(v) else f"{v:g}" if isinstance(v, float) else str(v) for v in values]


def require_sweep(table: pd.DataFrame) -> None:
    if table.empty:
        raise ValueError("the table is empty: there are no runs to show")
    absent = [column for column in SWEEP_COLUMNS if column not in table]
    if absent:
        raise ValueError(
            f"this is no table of a sweep: it lacks {', '.join(absent)}; use what ll.sweep returns"
        )
