"""The trade-off plane of single runs: some of them chosen, the others pale, quick to draw again."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lora_lens.forgetting.aggregate import pareto_front
from lora_lens.plots._scores import (
    PERCENT,
    method_colours,
    plane_legend,
    position_bar,
    position_colour,
    rate_markers,
    with_unit,
)
from lora_lens.widgets._explorer import Picture

SCORES = ["accuracy", "retained_accuracy"]
PALE, FRONT = "#cccccc", "0.45"
OTHER_METHODS = "#D55E00"
MOST_NAMED = 4  # methods with a colour of their own
LONGEST_NAME = 30  # characters

Ranges = tuple[tuple[float, float], tuple[float, float]]


class RunPlane:
    """Accuracy on the retained task against accuracy on the new one, a point per run.

    Colour is the window's position, shape the learning rate; other methods are hollow. The limits are those
    of all runs, so that the points stay where they are whatever is chosen.

    Args:
        table: of a sweep, one row per run, with an index of its own for each.

    Attributes:
        ax: the Axes that the points lie in.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self._table = table
        self._edges = method_colours(table["method"])
        if len(self._edges) > MOST_NAMED:
            self._edges = dict.fromkeys(self._edges, OTHER_METHODS)
        self._picture = Picture(self._draw, (9, 4.9))

    def html(self, shown: pd.Series, chosen: pd.Series, ranges: Ranges | None, alt: str) -> str:
        """The picture as an image.

        Args:
            shown: which rows are there at all, by the table's index; the others are left out.
            chosen: which of them are in colour; the others are pale.
            ranges: of accuracy and retained accuracy, drawn as a rectangle.
        """
        points = self._table[SCORES]
        bright, pale = shown & chosen, shown & ~chosen
        for rows, colours, in_colour, in_grey in self._groups:
            in_grey.set_offsets(points[rows & pale].to_numpy())
            in_colour.set_offsets(points[rows & bright].to_numpy())
            if colours is not None:
                in_colour.set_facecolor(colours[bright[rows]])
        front = points[bright]
        front = front[pareto_front(front)].sort_values("accuracy")
        self._front.set_data(front["accuracy"], front["retained_accuracy"])
        self._box.set_visible(ranges is not None)
        if ranges is not None:
            (left, right), (bottom, top) = ranges
            self._box.set_bounds(left, bottom, right - left, top - bottom)
        return self._picture.html(alt)

    def _draw(self, figure: Figure) -> list[PathCollection | Line2D | Rectangle]:
        self.ax = ax = figure.subplots()
        markers = rate_markers(self._table["lr"])
        self._groups = []
        for (method, rate), group in self._table.groupby(["method", "lr"], sort=False):
            look = {"marker": markers[rate], "s": 46}
            in_grey = ax.scatter([], [], facecolor="none", edgecolor=PALE, linewidth=1, zorder=1, **look)
            if method == "window":
                colours = np.array([position_colour(position) for position in group["position"]])
                own = {"edgecolor": "white", "linewidth": 0.6, "zorder": 4}
            else:
                colours = None
                own = {"facecolor": "white", "edgecolor": self._edges[method], "linewidth": 1.6, "zorder": 3}
            in_colour = ax.scatter([], [], **own, **look)
            self._groups.append((self._table.index.isin(group.index), colours, in_colour, in_grey))
        (self._front,) = ax.step([], [], where="pre", color=FRONT, linewidth=1.3, zorder=2)
        self._box = ax.add_patch(Rectangle((0, 0), 0, 0, fill=False, edgecolor="0.2", linestyle=(0, (4, 3))))
        self._finish(figure, ax, markers)
        moving = [
            self._front,
            self._box,
            *(artist for *_, one, other in self._groups for artist in (one, other)),
        ]
        return sorted(moving, key=lambda artist: artist.get_zorder())

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
