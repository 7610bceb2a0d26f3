"""A picture of which only some parts are drawn anew, and Axes that keep their place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lora_lens import plots
from lora_lens.plots._image import as_html, as_png
from lora_lens.plots._style import DRAWING


class Picture:
    """A picture in which a few things move: the rest is drawn once, so that a move takes milliseconds.

    Args:
        draw: draws on the figure, and returns the artists that move. Between two calls of
            :meth:`html` they may be given other data, places and words; all else stays as it is.
        size: in inches.
    """

    def __init__(
        self, draw: Callable[[Figure], Iterable[Artist]], size: tuple[float, float] = (8, 4.2)
    ) -> None:
        with plots.house_style():
            figure = Figure(figsize=size)
            self._canvas = FigureCanvasAgg(figure)
            self._moving = list(draw(figure))
            words = {artist: artist.get_text() for artist in self._moving if isinstance(artist, Text)}
            for artist in self._moving:
                artist.set_animated(True)  # left out of what is drawn now
            for text in words:
                text.set_text("")  # an axis draws its label, animated or not
            self._canvas.draw()
            for text, said in words.items():
                text.set_text(said)
            self._bare = self._still = self._canvas.copy_from_bbox(figure.bbox)

    def lay_under(self, artists: Iterable[Artist]) -> None:
        """Draw these below all that moves, until others are laid there: many that seldom change."""
        with DRAWING:
            self._draw(self._bare, artists)
            self._still = self._canvas.copy_from_bbox(self._canvas.figure.bbox)

    def below(self) -> bytes:
        """A PNG of all that does not move."""
        self._canvas.restore_region(self._still)
        return as_png(self._canvas)

    def html(self, alt: str) -> str:
        """The picture as it is now, as :func:`drawn` gives it."""
        with DRAWING:
            self._draw(self._still, self._moving)
            return as_html(self._canvas, alt)

    def _draw(self, below: object, artists: Iterable[Artist]) -> None:
        self._canvas.restore_region(below)
        for artist in artists:
            artist.draw(self._canvas.get_renderer())


def fixed_axes(figure: Figure, place: tuple[float, float, float, float] = (0.085, 0.14, 0.9, 0.77)) -> Axes:
    """Axes that stay where they are as labels change, without the time that arranging them takes."""
    figure.set_layout_engine("none")
    return figure.add_axes(place)


def fixed_row(figure: Figure, count: int, **margins: float) -> np.ndarray:
    """Likewise ``count`` Axes side by side; shape (count,)."""
    figure.set_layout_engine("none")
    places = {"left": 0.065, "right": 0.99, "bottom": 0.15, "top": 0.86, "wspace": 0.17, **margins}
    return figure.subplots(1, count, squeeze=False, gridspec_kw=places)[0]
