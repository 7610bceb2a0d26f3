"""Pictures whose points are buttons, and on which a rectangle can be drawn.

An HTML image cannot say where it was clicked, so every point gets a real button, placed over the picture in
percent of its size: it grows and shrinks with it, takes the keyboard, and has a name for screen readers. What
is chosen comes back through :class:`lora_lens.widgets._page.Page`, whose side in the browser is explorer.js.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.axes import Axes

from lora_lens._base.errors import InputError

Rectangle = tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Spot:
    """A point of a picture that can be picked.

    Attributes:
        x, y: where it is, in the units of the Axes.
        label: what it is, in words, for a tip at the pointer and for screen readers.
        value: what picking it gives.
        aside: True where the arrow keys pass it by; it can still be clicked.
    """

    x: float
    y: float
    label: str
    value: str
    aside: bool = False


def clickable(
    image: str, ax: Axes, spots: Iterable[Spot], *, name: str, picked: str = "", brush: bool = False
) -> str:
    """The picture under its spots.

    One of them takes the focus by Tab: the one picked, or else the first. Arrow keys lead to the next spot in
    their direction, Page Up and Page Down along their order, Home and End to its ends; Enter and Space pick.

    Args:
        image: HTML of the figure of ``ax``, from :func:`lora_lens.plots._image.drawn` or of a
            :class:`lora_lens.widgets._picture.Picture`. It must be drawn, or the Axes have no place yet.
        ax: the Axes that the spots lie in. Those without a finite place are left out.
        name: of the points together, for screen readers.
        picked: the value of the spot that is marked.
        brush: True where dragging draws a rectangle, as arrow keys do while Shift is held.
    """
    width, height = ax.figure.bbox.size
    known = [spot for spot in spots if np.isfinite([spot.x, spot.y]).all()]
    at = ax.transData.transform([(spot.x, spot.y) for spot in known]) if known else np.empty((0, 2))
    at = 100 * at / (width, height)
    stop = next(
        (spot for spot in known if spot.value == picked),
        next((spot for spot in known if not spot.aside), None),
    )
    buttons = [
        _button(spot, x, 100 - y, spot.value == picked, spot is stop)
        for spot, (x, y) in zip(known, at, strict=True)
    ]
    area = f'<div class="ll-brush" style="{_place(ax)}"></div>' if brush else ""
    keys = "arrow keys move between them, Page Up and Page Down go through all, Enter shows one"
    keys += ", arrow keys with Shift draw a rectangle" * brush
    return (
        f'<div class="ll-plane" role="group" aria-label="{escape(f"{name}: {keys}")}" '
        'data-lm-suppress-shortcuts="true" '  # or JupyterLab takes the keys for its own
        f'style="position: relative; max-width: {width:.0f}px">'
        f"{image}{area}{''.join(buttons)}</div>"
    )


def brushed_ranges(text: str, ax: Axes) -> Rectangle:
    """((left, right), (bottom, top)) of a drawn rectangle in the units of the Axes.

    Args:
        text: "x0,y0,x1,y1", two opposite corners in shares of the Axes' sides, from the lower left.

    Raises:
        ValueError: it is not four numbers from 0 to 1.
    """
    try:
        x0, y0, x1, y1 = corners = [float(part) for part in text.split(",")]
    except ValueError:
        corners = []
    if len(corners) != 4 or not all(0 <= share <= 1 for share in corners):
        raise InputError(f"a rectangle is four shares from 0 to 1, x0,y0,x1,y1, not {text!r}")
    start, end = np.transpose([ax.get_xlim(), ax.get_ylim()])  # each (x, y)
    ends = start[:, None] + np.array([(x0, x1), (y0, y1)]) * (end - start)[:, None]
    (left, right), (bottom, top) = np.sort(ends, axis=1).tolist()
    return (left, right), (bottom, top)


def _place(ax: Axes) -> str:
    """Of the Axes in the figure."""
    box = ax.get_position()
    sides = {"left": box.x0, "top": 1 - box.y1, "width": box.width, "height": box.height}
    return "; ".join(f"{side}: {100 * share:.3f}%" for side, share in sides.items())


def _button(spot: Spot, left: float, top: float, picked: bool, stop: bool) -> str:
    """Hidden but where explorer.css shows it: a saved page without the style has nothing to click."""
    label = escape(spot.label)
    return (
        f'<button type="button" hidden class="ll-spot{" ll-aside" if spot.aside else ""}" '
        f'style="left: {left:.3f}%; top: {top:.3f}%" value="{escape(spot.value)}" '
        f'tabindex="{0 if stop else -1}" aria-pressed="{"true" if picked else "false"}" '
        f'aria-label="{label}" title="{label}"></button>'
    )
