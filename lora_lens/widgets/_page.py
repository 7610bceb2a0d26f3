"""What an explorer does in the browser itself: the only module that touches anywidget."""

from __future__ import annotations

from pathlib import Path

from anywidget import AnyWidget
from traitlets import Unicode

STATIC = Path(__file__).with_name("static")


class Page(AnyWidget):
    """Names sliders for screen readers, takes clicks in a picture, says when no kernel answers.

    A front end that cannot load it shows an explorer without these; all else goes on.

    Attributes:
        still: the class of the still copy of the explorer, which is hidden where this runs.
        picked: the value of the point that was clicked last.
        brushed: the rectangle drawn last, "x0,y0,x1,y1" in shares of the sides of the Axes.
    """

    _esm = STATIC / "explorer.js"
    _css = STATIC / "explorer.css"
    still = Unicode().tag(sync=True)
    picked = Unicode().tag(sync=True)
    brushed = Unicode().tag(sync=True)
