"""The trade-off plane of single runs: some of them chosen, the others pale, quick to draw again."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import IdentityTransform

from lora_lens.forgetting.aggregate import pareto_front
from lora_lens.plots._image import as_png
from lora_lens.plots._scores import (
    PERCENT,
    method_colours,
    plane_legend,
    position_bar,
    position_colour,
    rate_markers,
    with_unit,
)
from lora_lens.widgets._picture import Picture

SCORES = ["accuracy", "retained_accuracy"]
PALE, FRONT = "#cccccc", "0.45"
OTHER_METHODS = "#D55E00"
MOST_NAMED = 4  # methods with a colour of their own
LONGEST_NAME = 30  # characters
SIZE = 6.8  # of the points
SIDE, COLUMNS = 24, 32  # pixels around a marker, and markers in a row

Looks = list[tuple[np.ndarray, Line2D]]  # rows, and the line whose markers they are
Ranges = tuple[tuple[float, float], tuple[float, float]]


class RunPlane:
    """Accuracy on the retained task against accuracy on the new one, a point per run.

    Colour is the window's position, shape the learning rate; other methods are hollow. The limits are those
    of all runs, so that the points stay where they are whatever is chosen.

    Args:
        table: of a sweep, one row per run.

    Attributes:
        ax: the Axes that the points lie in.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self._table, self._points = table, table[SCORES].to_numpy(float)
        self._shown = np.empty(0)
        self._edges = method_colours(table["method"])
        if len(self._edges) > MOST_NAMED:
            self._edges = dict.fromkeys(self._edges, OTHER_METHODS)
        self._picture = Picture(self._draw, (9, 4.9))
        self._markers = _sheet([points for _, points in self._bright])

    def html(self, shown: np.ndarray, chosen: np.ndarray, ranges: Ranges | None, alt: str) -> str:
        """The picture as an image.

        Args:
            shown: which rows are there at all, (rows,) of bool; the others are left out.
            chosen: which of them are in colour; the others are pale.
            ranges: of accuracy and retained accuracy, drawn as a rectangle.
        """
        if not np.array_equal(shown, self._shown):
            self._shown = shown
            self._place(self._pale, shown)
            self._picture.lay_under(points for _, points in self._pale)
            self._under = self._picture.below()
        self._place(self._bright, shown & chosen)
        front = pd.DataFrame(self._points[shown & chosen], columns=SCORES)
        front = front[pareto_front(front)].sort_values("accuracy")
        self._front.set_data(front["accuracy"], front["retained_accuracy"])
        self._box.set_visible(ranges is not None)
        if ranges is not None:
            (left, right), (bottom, top) = ranges
            self._box.set_bounds(left, bottom, right - left, top - bottom)
        return self._picture.html(alt)

    def for_page(self, offered: np.ndarray, step: float) -> dict[str, object]:
        """What a page needs to draw the points of a choice by itself, to the pixel as :meth:`html` does.

        Args:
            offered: which of the rows last shown may be chosen, (rows,) of bool.
            step: of the ranges of both scores.

        Returns:
            ``under`` and ``markers``, PNGs of what lies below, with all points pale, and of a marker of each
            look, in rows of squares of ``side`` pixels; of each point in the order of drawing, ``scores``,
            (points, 2) of float64, and ``places``, (points, 3) of int16: which marker, and the left and upper
            edge of its square; and the ``limits`` of the Axes and the ``step``.
        """
        there = offered & np.isfinite(self._points).all(axis=1)
        looks = [rows[there[rows]] for rows, _ in self._bright]
        rows, sizes = np.concatenate(looks), [len(rows) for rows in looks]
        x, y = self.ax.transData.transform(self._points[rows]).T
        # Agg puts markers on whole pixels, in this way.
        middles = np.floor([x + 0.5, self.ax.figure.bbox.height - y + 0.5])
        places = [np.repeat(np.arange(len(looks)), sizes), *(middles - SIDE // 2)]
        return {
            "under": self._under,
            "markers": self._markers,
            "side": SIDE,
            "scores": self._points[rows].astype("<f8").tobytes(),
            "places": np.transpose(places).astype("<i2").tobytes(),
            "limits": [self.ax.get_xlim(), self.ax.get_ylim()],
            "step": step,
        }

    def _place(self, looks: Looks, there: np.ndarray) -> None:
        for rows, points in looks:
            some = rows[there[rows]]
            points.set_data(*self._points[some].T)
            points.set_visible(len(some) > 0)

    def _draw(self, figure: Figure) -> list[Line2D | Rectangle]:
        """Points of one look are the markers of one line, drawn in a tenth of the time of a scatter's.

        All points lie pale under those in colour, which cover their own: a brush draws the latter alone.
        """
        self.ax = ax = figure.subplots()
        markers = rate_markers(self._table["lr"])
        windows = self._table["method"] == "window"
        position = self._table["position"].where(windows).astype(float).round(2)  # as far as colours differ

        def line(rate: float, **look: object) -> Line2D:
            return ax.plot([], [], markers[rate], linestyle="", markersize=SIZE, **look)[0]

        self._pale, self._bright = [], []
        for rate, rows in self._table.groupby("lr").indices.items():
            pale = {"markerfacecolor": "none", "markeredgecolor": PALE, "markeredgewidth": 1, "zorder": 1}
            self._pale.append((rows, line(rate, **pale)))
        for (method, rate, place), rows in self._table.groupby(
            [self._table["method"], "lr", position], sort=False, dropna=False
        ).indices.items():
            if method == "window":
                own = {"markerfacecolor": position_colour(place), "markeredgecolor": "white", "zorder": 4}
                own["markeredgewidth"] = 0.6
            else:
                own = {"markerfacecolor": "white", "markeredgecolor": self._edges[method], "zorder": 3}
                own["markeredgewidth"] = 1.6
            self._bright.append((rows, line(rate, **own)))
        (self._front,) = ax.step([], [], where="pre", color=FRONT, linewidth=1.3, zorder=2)
        self._box = ax.add_patch(Rectangle((0, 0), 0, 0, fill=False, edgecolor="0.2", linestyle=(0, (4, 3))))
        self._finish(figure, ax, markers)
        self._bright.sort(key=lambda look: look[1].get_zorder())
        return [self._box, self._front, *(points for _, points in self._bright)]

    def _finish(self, figure: Figure, ax: Axes, markers: dict[float, str]) -> None:
        for score, limit in zip(SCORES, (ax.set_xlim, ax.set_ylim), strict=True):
            low, high = self._table[score].min(), self._table[score].max()
            margin = 0.05 * (high - low) or 0.05
            limit(low - margin, high + margin)
        position_bar(ax)
        one_look = OTHER_METHODS in self._edges.values()
        edges = {"other methods": OTHER_METHODS} if one_look else self._edges
        handles = plane_legend(markers, edges, "front of the chosen runs", FRONT, LONGEST_NAME)
        figure.legend(handles=handles, loc="outside right center")
        ax.xaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set(
            xlabel=with_unit("accuracy", self._table),
            ylabel=with_unit("retained_accuracy", self._table),
            title="The trade-off, run by run: up and to the right is better",
        )


def _sheet(lines: list[Line2D]) -> bytes:
    """A PNG of their markers in rows of ``COLUMNS``, each in the middle of a square of ``SIDE`` pixels."""
    dpi, size = lines[0].figure.dpi, (SIDE * COLUMNS, SIDE * -(-len(lines) // COLUMNS))
    inches = np.add(size, 0.5) / dpi  # half a pixel more, as they are rounded down
    figure = Figure(figsize=inches, dpi=dpi, facecolor="none", layout="none")
    for number, line in enumerate(lines):
        row, column = divmod(number, COLUMNS)
        marker = Line2D([SIDE * (column + 0.5)], [size[1] - SIDE * (row + 0.5)])
        marker.update_from(line)
        marker.set(transform=IdentityTransform(), animated=False, visible=True, clip_on=False)
        figure.add_artist(marker)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return as_png(canvas, "RGBA")
