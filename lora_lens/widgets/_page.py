"""What an explorer does in the browser itself: the only module that touches anywidget, but for _follower."""

from __future__ import annotations

from pathlib import Path

from anywidget import AnyWidget
from traitlets import Bool, Dict, Unicode

STATIC = Path(__file__).with_name("static")


class Page(AnyWidget):
    """Names sliders for screen readers, takes clicks in a picture, says what is worked at or cannot be, and
    has the buttons that each explorer has.

    A front end that cannot load it shows an explorer without these; all else goes on.

    Attributes:
        still: the class of the still copy of the explorer, which is hidden where this runs.
        picked: the value of the point that was clicked last.
        busy: something is worked at; the page says so once it takes long.
        brushed: the rectangle drawn last, "x0,y0,x1,y1" in shares of the sides of the Axes.
        points: what the page draws those in a rectangle with, from :meth:`RunPlane.for_page`, or nothing.
        code: the line of Python that makes the explorer as it is.
        undoable: there is a choice to take back; the message "undo" asks for it.
    """

    _esm = STATIC / "explorer.js"
    _css = STATIC / "explorer.css"
    still = Unicode().tag(sync=True)
    busy = Bool().tag(sync=True)
    picked = Unicode().tag(sync=True)
    brushed = Unicode().tag(sync=True)
    points = Dict().tag(sync=True)
    code = Unicode().tag(sync=True)
    undoable = Bool().tag(sync=True)
