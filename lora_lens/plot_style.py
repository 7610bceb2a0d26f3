"""The look that all pictures share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar

STYLE = str(Path(__file__).with_name("lora_lens.mplstyle"))


@contextmanager
def house_style() -> Iterator[None]:
    """Give figures that are made within it the look of all pictures here."""
    with plt.style.context(STYLE):
        try:
            yield
        finally:
            interactive = plt.isinteractive()
    # A notebook's backend is loaded by the first figure and turns interactive mode on. The end of
    # the style would turn it off again, and the notebook would show no figure after the first.
    matplotlib.interactive(interactive)


def styled(draw: Callable[..., Axes]) -> Callable[..., Axes]:
    """Draw in the house style, on the given ``ax`` or on a new pyplot figure."""

    @wraps(draw)
    def draw_styled(*arguments: object, ax: Axes | None = None, **options: object) -> Axes:
        with house_style():
            return draw(*arguments, ax=plt.subplots()[1] if ax is None else ax, **options)

    return draw_styled


def colour_bar(image: ScalarMappable, ax: Axes | np.ndarray, label: str) -> Colorbar:
    bar = np.ravel(ax)[0].figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar
