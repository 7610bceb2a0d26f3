"""Controls that choose runs of a sweep: windows, and ranges of both accuracies, set by sliders or a brush."""

from __future__ import annotations

import numpy as np
import pandas as pd
from ipywidgets import Button, FloatRangeSlider, Layout, Widget as Control
from matplotlib.axes import Axes

from lora_lens._base.errors import InputError
from lora_lens.widgets._clickable import brushed_ranges
from lora_lens.widgets._explorer import WORDS, window_choice
from lora_lens.widgets._page import Page

RANGED = ["accuracy", "retained_accuracy"]  # along x and along y
STEP = 0.01  # of their sliders, in shares
EVERYTHING = "all runs"  # brushed in one move, which undo takes back in one


class RunChoice:
    """Which runs are looked at; all of them at first.

    The sliders are the single source of truth: a rectangle drawn in the plane moves them.

    Args:
        table: with the scores and window, the name of each run's window or method.
        page: where the rectangle is drawn.

    Attributes:
        controls: to be shown, and to be observed.
    """

    def __init__(self, table: pd.DataFrame, page: Page) -> None:
        self._table, self._page = table, page
        ordered = table.sort_values(["method", "position"], ascending=[False, True])
        self._names = list(ordered["window"].unique())
        self._codes = table["window"].map(self._names.index).to_numpy()  # numbers are compared at once
        self._windows = window_choice(self._names)
        self._ranges = [_range_slider(table[column], column.replace("_", " ")) for column in RANGED]
        everything = Button(description=EVERYTHING, tooltip="undo the choice of windows and of ranges")
        everything.on_click(self._choose_all)
        self.controls: list[Control] = [self._windows, *self._ranges, everything]

    def take_brush(self, ax: Axes) -> None:
        """Move the sliders to the rectangle that was drawn in the Axes, if there is one.

        Raises:
            ValueError: it is no rectangle.
        """
        text, self._page.brushed = self._page.brushed, ""  # the same one may be drawn again
        if text == EVERYTHING:
            self._windows.value = self._windows.options
            text = "0,0,1,1"
        if text:
            for slider, (low, high) in zip(self._ranges, brushed_ranges(text, ax), strict=True):
                slider.value = np.clip(_outwards(low, high), slider.min, slider.max).tolist()

    def values(self) -> tuple[tuple[str, ...], tuple[float, float], tuple[float, float]]:
        """The names of windows, and the ranges of accuracy and retained accuracy.

        Raises:
            ValueError: no window is chosen.
        """
        if not self._windows.value:
            raise InputError("choose at least one window or method")
        return self._windows.value, *(slider.value for slider in self._ranges)

    def of_windows(self) -> np.ndarray:
        """True for each run of the table whose window or method is chosen, (rows,)."""
        return np.isin(self._codes, [self._names.index(name) for name in self._windows.value])

    def inside(self) -> np.ndarray:
        """True for each run of the table that is chosen, (rows,)."""
        _, *ranges = self.values()
        inside = self.of_windows()
        for column, (low, high) in zip(RANGED, ranges, strict=True):
            inside &= self._table[column].between(low - 1e-9, high + 1e-9).to_numpy()
        return inside

    def narrowed(self) -> tuple[tuple[float, float], tuple[float, float]] | None:
        """The ranges, unless both are whole."""
        if all(slider.value == (slider.min, slider.max) for slider in self._ranges):
            return None
        return tuple(slider.value for slider in self._ranges)

    def _choose_all(self, _click: Button) -> None:
        self._page.brushed = EVERYTHING


def _outwards(low: float, high: float) -> tuple[float, float]:
    """The whole steps around them: what is inside stays inside."""
    return tuple(np.round([np.floor(low / STEP) * STEP, np.ceil(high / STEP) * STEP], 2).tolist())


def _range_slider(values: pd.Series, description: str) -> FloatRangeSlider:
    """From the step below the lowest to the step above the highest value, in percent."""
    low, high = _outwards(values.min(), values.max())
    high = max(high, low + STEP)
    return FloatRangeSlider(
        value=(low, high), min=low, max=high, step=STEP, readout_format=".0%", description=description,
        style=WORDS, layout=Layout(width="30em", max_width="98%"),
    )  # fmt: skip
