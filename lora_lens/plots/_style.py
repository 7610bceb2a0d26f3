"""The look that all pictures share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from threading import RLock

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure

from lora_lens._base.errors import InputError
from lora_lens._base.validate import instance, known_settings, sequence

STYLE = str(Path(__file__).with_name("lora_lens.mplstyle"))
DRAWING = RLock()  # matplotlib's settings belong to the process, and pictures are drawn by several threads
NO_WIDTH = "\N{ZERO WIDTH SPACE}"


@contextmanager
def house_style() -> Iterator[None]:
    """Give figures that are made within it the look of all pictures here; one thread at a time.

    Example:
        >>> import lora_lens as ll, matplotlib.pyplot as plt
        >>> with ll.plots.house_style():
        ...     figure, axes = plt.subplots(1, 2)
    """
    with DRAWING, plt.style.context(STYLE):
        try:
            yield
        finally:
            interactive = plt.isinteractive()
    # A notebook's backend is loaded by the first figure and turns interactive mode on. The end of
    # the style would turn it off again, and the notebook would show no figure after the first.
    matplotlib.interactive(interactive)


def styled(draw: Callable[..., Axes]) -> Callable[..., Axes]:
    """Draw in the house style, on the given ``ax`` or on a new pyplot figure; none is left by bad input."""
    known = list(inspect.signature(draw).parameters)

    @wraps(draw)
    def draw_styled(*arguments: object, ax: Axes | None = None, **options: object) -> Axes:
        known_settings(options, known, f"plots.{draw.__name__}")
        require_axes(ax)
        with house_style():
            if ax is not None:
                return draw(*arguments, ax=ax, **options)
            figure, ax = plt.subplots()
            try:
                return draw(*arguments, ax=ax, **options)
            except Exception:
                plt.close(figure)
                raise

    return draw_styled


def require_axes(ax: object) -> None:
    """Refuse what cannot be drawn on; None stands for a new figure."""
    if ax is not None:
        instance(ax, Axes, "ax", "matplotlib Axes, such as plt.subplots()[1]")


def some_axes(axes: object, least: int, what: str) -> np.ndarray:
    """``axes`` as an array (n,) of at least ``least``, each for one of ``what``.

    Raises:
        InputTypeError: they are no Axes.
        InputError: they are too few.
    """
    flat = sequence(axes.ravel() if isinstance(axes, np.ndarray) else axes, "axes", "matplotlib Axes", Axes)
    for ax in flat:
        instance(ax, Axes, "each of axes", "matplotlib Axes, such as those of plt.subplots(2, 3)[1]")
    if len(flat) < least:
        raise InputError(f"there are {least} {what} but only {len(flat)} axes to draw on")
    found = np.empty(len(flat), object)
    found[:] = flat
    return found


def panels(
    count: int,
    columns: int,
    figure: Figure | None = None,
    each: tuple[float, float] = (2.7, 2.7),
    more: tuple[float, float] = (0, 0),
    **shared: object,
) -> np.ndarray:
    """``count`` Axes in rows of ``columns``; shape (count,).

    Args:
        figure: an empty one; default a new pyplot figure, for each of them as large as ``each`` (inches) and
            ``more`` beside.
        shared: for ``Figure.subplots``.
    """
    columns = min(count, columns)
    rows = -(-count // columns)
    if figure is None:
        figure = plt.figure(figsize=(each[0] * columns + more[0], each[1] * rows + more[1]))
    axes = figure.subplots(rows, columns, squeeze=False, **shared).ravel()
    for ax in axes[count:]:
        ax.remove()
    for ax in axes[max(count - columns, 0) : count]:
        ax.xaxis.set_tick_params(labelbottom=True)  # also where the panel below was removed
    return axes[:count]


def literal(name: object) -> str:
    """A name as a picture shall show it.

    Matplotlib takes what stands between two $ for a formula, and leaves what begins with _ out of legends.
    """
    text = str(name).replace("$", r"\$")
    return NO_WIDTH + text if text.startswith("_") else text


def colour_bar(image: ScalarMappable, ax: Axes | np.ndarray, label: str) -> Colorbar:
    bar = np.ravel(ax)[0].figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
    return bar
