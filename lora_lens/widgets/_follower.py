"""Pictures that follow a window's sliders in the browser itself, while the kernel's are on their way.

A move of a slider goes through the server to the kernel and comes back as pictures: 50 milliseconds and more
before anything is drawn, on a distant server far more. So the page has what it needs to draw what moves.
"""

from __future__ import annotations

import builtins
from html import escape

from anywidget import AnyWidget
from ipywidgets import Widget, widget_serialization
from traitlets import Dict, Instance

from lora_lens.widgets._page import STATIC

MOST = 8e6  # bytes for one picture, once for each layer; larger ones wait for the kernel


class Follower(AnyWidget):
    """Draws what a window moves in the pictures of its explorer; a front end that cannot load it shows the
    kernel's pictures alone.

    Attributes:
        rank, position: the sliders.
        parts: by the names of :func:`followed`, what the page draws a picture's moving parts with: its
            ``kind``, the ``k`` of its spectrum, where they lie (``boxes``) and what its kind needs
            (follower.js).
    """

    _esm = STATIC / "follower.js"
    rank = Instance(Widget).tag(sync=True, **widget_serialization)
    position = Instance(Widget).tag(sync=True, **widget_serialization)
    parts = Dict().tag(sync=True)


def small_parts(parts: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """Those that a page can be sent at once."""
    return {name: part for name, part in parts.items() if _bytes(part) <= MOST}


def _bytes(part: dict[str, object]) -> int:
    return sum(len(value) for value in part.values() if isinstance(value, bytes))


def followed(image: str, name: str, part: builtins.slice) -> str:
    """An HTML image that says which picture it is, and of which components."""
    window = f"{part.start}, {part.stop}"
    return f'{image.removesuffix(">")} data-follows="{escape(name)}" data-window="{window}">'
