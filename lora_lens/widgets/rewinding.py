"""The explorer of ways back from a trained adapter."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd
from ipywidgets import HTML, Layout, SelectionSlider, ToggleButtons
from matplotlib.artist import Artist
from matplotlib.figure import Figure

from lora_lens import plots
from lora_lens.forgetting.rewound import Rewound
from lora_lens.plots._scores import PERCENT, in_words
from lora_lens.plots.after_training import HEIGHTS, rewound_table
from lora_lens.plots.single_runs import ALONG
from lora_lens.widgets._explorer import WORDS, Explorer, dropdown, explorer, html_table, table_box
from lora_lens.widgets._picture import Picture, fixed_row

SHOWN = {
    "t": "{:g}",
    "update": "{:.0%}",
    "accuracy": "{:.1%}",
    "retained_accuracy": "{:.1%}",
    "forgetting": "{:.1%}",
    "loss_rise": "{:.3f}",
}


@explorer
def rewind_explorer(rewound: Rewound | pd.DataFrame) -> Explorer:
    """The ways back from a trained adapter: move t, and both scores follow.

    Controls: the path; t, among the points that were measured on any of them (of a path without a point
    there, the nearest is shown); and what stands for forgetting in the plane.
    Shown: all paths in the trade-off plane with the point marked, both accuracies of the path against t, and
    the scores of the point in numbers, beside those of the trained model.

    Args:
        rewound: from :func:`lora_lens.rewind`, or its table.

    Raises:
        ValueError: the table is empty or lacks columns.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> table = pd.DataFrame({"path": "whole update", "t": [0, 0.5, 1], "accuracy": [0.1, 0.8, 0.9]})
        >>> table = table.assign(update=table["t"], retained_accuracy=[0.9, 0.88, 0.7])
        >>> table = table.assign(forgetting=0.9 - table["retained_accuracy"], loss_rise=[0, 0.1, 0.4])
        >>> explorer = ll.widgets.rewind_explorer(table)  # the last line of a cell shows it
        >>> [control.description for control in explorer.children[1].children]
        ['path', 't', 'forgetting as']
    """
    table = rewound_table(rewound, *[column for column in SHOWN if column not in ("t", "accuracy")])
    path = dropdown("path", table["path"].unique())
    path.layout = Layout(width="28em", max_width="98%")
    wide = Layout(width="30em", max_width="98%")
    # Of all paths: a slider whose options change with the path gets moves that were made on the old ones.
    every = sorted(table["t"].unique())
    options = [(f"{one:.4g}", one) for one in every]
    trained = min(every, key=lambda one: abs(one - 1))
    t = SelectionSlider(options=options, value=trained, description="t", layout=wide)
    height = ToggleButtons(
        options=[("accuracy", HEIGHTS[0]), ("rise of the loss", HEIGHTS[1])],
        description="forgetting as",
        style=WORDS,
    )
    picture, numbers = HTML(), table_box()

    named = {score: in_words(score, table) for score in ("accuracy", "retained_accuracy")}

    @lru_cache(maxsize=8)
    def picture_of(path: str, y: str) -> _Picture:
        return _Picture(table, path, y)

    def draw() -> None:
        points = table[table["path"] == path.value].sort_values("t")
        row = points.iloc[(points["t"] - t.value).abs().argmin()]
        at = f"t = {row['t']:g}" + ("" if row["t"] == t.value else ", the nearest measured")
        scores = ", ".join(f"{words} {row[score]:.1%}" for score, words in named.items())
        picture.value = picture_of(path.value, height.value).html(row, f"{path.value} at {at}: {scores}")
        end = points[points["t"] == 1]
        rows = {at: row} | ({"trained": end.iloc[0]} if len(end) else {})
        said = {
            column.replace("_", " "): [form.format(one[column]) for one in rows.values()]
            for column, form in SHOWN.items()
            if column != "t"
        }
        numbers.value = html_table(pd.DataFrame({"point": list(rows), **said}))

    return Explorer([[path, t, height]], [picture, numbers], draw)


class _Picture:
    """The plane, and both accuracies along one path, in which the point moves."""

    def __init__(self, table: pd.DataFrame, path: str, y: str) -> None:
        points = table[table["path"] == path].sort_values("t")
        self.y = y

        def draw(figure: Figure) -> list[Artist]:
            plane, along = fixed_row(figure, 2, left=0.085, wspace=0.2)
            plots.rewinding(table, y, ax=plane)
            for score, (name, look) in ALONG.items():
                along.plot(points["t"], points[score], markersize=4, label=name, **look)
            along.yaxis.set_major_formatter(PERCENT)
            along.set(xlabel="t", title="Accuracy along this path (%)")
            along.legend(loc="best")
            ring = {"markersize": 13, "markerfacecolor": "none", "markeredgecolor": "black", "linestyle": ""}
            first = points["accuracy"].iloc[:1], points[y].iloc[:1]  # somewhere inside the plane
            (self.point,) = plane.plot(*first, "o", label="_point", **ring)
            self.line = along.axvline(1, color="black", linewidth=1.2)
            return [self.point, self.line]

        self.picture = Picture(draw, (11, 4.2))

    def html(self, row: pd.Series, alt: str) -> str:
        self.point.set_data([row["accuracy"]], [row[self.y]])
        self.line.set_xdata([row["t"], row["t"]])
        return self.picture.html(alt)
