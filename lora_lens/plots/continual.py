"""Pictures of continual learning along its tasks: what is kept of each while others are learnt after it.

Tables are those of :func:`lora_lens.experiments.continual_sweep`. Bands are 95% intervals of means over runs
(orders and seeds) by :func:`lora_lens.forgetting.seed_interval`; a single run has none.
"""

from __future__ import annotations

from itertools import cycle
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.validate import choice
from lora_lens.forgetting.run_groups import mean_and_interval
from lora_lens.plots._scores import (
    OTHERS,
    PERCENT,
    placed_windows,
    position_bar,
    position_colour,
    shortened,
)
from lora_lens.plots._sequences import (
    LINES,
    MARKERS,
    METHOD,
    OTHER_MARKERS,
    drifts_by_run,
    method_names,
    of_one_method,
)
from lora_lens.plots._style import colour_bar, literal, styled

MEASURES = {
    "overlap_left": "overlap with the first window, left",
    "overlap_right": "overlap with the first window, right",
    "block_change": "change of what the first window does",
}
RETAINED = "#202020"
GAP = 0.25  # cells between the tasks and the retained one


@styled
def accuracy_heatmap(table: pd.DataFrame, run: str | None = None, *, ax: Axes) -> Axes:
    """The accuracy on every task (columns) after each task was learnt (rows), in percent.

    This is the matrix R of Lopez-Paz and Ranzato 2017, arXiv 1706.08840. A frame marks what was learnt just
    before; cells that are hatched have no value: a task without a head yet, or what joint training never
    was. The column apart is the pretrained task, its accuracy before all training below its name. Several
    runs show their mean, by the tasks' places where their orders differ. Colours run from 0 to 100% in every
    picture.

    Args:
        table: from :func:`lora_lens.experiments.continual_sweep`, of one strategy and method.
        run: which of its runs; default the mean over all of them.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column or the run is missing, there are no rows, or they are of several strategies,
            methods or sets of tasks.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")
        >>> middle = sweep.table.query("strategy == 'merged' and position == 0.5")
        >>> ll.plots.accuracy_heatmap(middle).get_title()
        'merged: window at 0.5, mean of 9 runs'
    """
    rows = of_one_method(table, run)
    names = _task_names(rows)
    accuracy = rows.groupby(["after", "place"])["accuracy"].mean().unstack("place")
    accuracy = accuracy[accuracy.index > 0]
    cells = 100 * accuracy.to_numpy(float)  # (tasks trained, tasks)
    count = len(names)
    edges = np.arange(count + 1.0)
    labels = [(place + 0.5, name) for place, name in enumerate(names)]
    retained = _retained(rows)
    if retained is not None:
        apart = 100 * retained.reindex(accuracy.index).to_numpy(float)[:, None]
        cells = np.hstack([cells, np.full_like(apart, np.nan), apart])
        edges = np.append(edges, [count + GAP, count + GAP + 1])
        labels.append((count + GAP + 0.5, f"retained\n({100 * retained.iloc[0]:.1f} before)"))
    mesh = ax.pcolormesh(
        edges, np.arange(len(cells) + 1.0), cells, cmap="viridis", vmin=0, vmax=100,
        edgecolor="white", linewidth=1,
    )  # fmt: skip
    _write_cells(ax, mesh, cells, edges)
    for place in range(min(count, len(cells))):
        if np.isfinite(cells[place, place]):
            frame = {
                "fill": False,
                "edgecolor": "black",
                "linewidth": min(2, 16 / len(cells)),
                "clip_on": False,
                "zorder": 3,
            }
            ax.add_patch(Rectangle((place, place), 1, 1, **frame))
    _name_columns(ax, labels, edges[-1])
    ax.set_yticks(np.arange(len(cells)) + 0.5, [f"{after:g}" for after in accuracy.index])
    ax.tick_params(length=0)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.invert_yaxis()
    ax.grid(False)
    colour_bar(mesh, ax, "test accuracy (%)")
    ax.set(ylabel="tasks learnt", title=_title(ax, rows))
    return ax


def _write_cells(ax: Axes, mesh: ScalarMappable, cells: np.ndarray, edges: np.ndarray) -> None:
    box = ax.get_window_extent()
    room = 72 / ax.figure.dpi * min(box.width / edges[-1] / 3, box.height / len(cells))  # points
    size = min(plt.rcParams["font.size"], 0.75 * room)
    for (row, column), value in np.ndenumerate(cells):
        left, width = edges[column], edges[column + 1] - edges[column]
        if np.isfinite(value):
            light = np.dot(mesh.to_rgba(value)[:3], [0.299, 0.587, 0.114]) > 0.5
            look = {"color": "black" if light else "white", "fontsize": size, "ha": "center", "va": "center"}
            ax.text(left + width / 2, row + 0.5, f"{value:.1f}", **look)
        elif width == 1:
            look = {"facecolor": "0.97", "edgecolor": "0.82", "hatch": "///", "linewidth": 0}
            ax.add_patch(Rectangle((left, row), 1, 1, **look))


def _name_columns(ax: Axes, labels: list[tuple[float, str]], cells: float) -> None:
    """Labels below the cells, in lines as wide as one, or turned where a word is wider."""
    room = 72 / ax.figure.dpi * ax.get_window_extent().width / cells  # points
    size = plt.rcParams["font.size"]
    most = int(room / (0.55 * size))
    turned = any(len(word) > most for _, label in labels for word in label.split())
    if turned and room < 2.8 * size:
        names, size = [label.replace("\n", " ") for _, label in labels], min(size, room / 1.6)
    else:
        width = 24 if turned else most
        names = ["\n".join(fill(line, width) for line in label.split("\n")) for _, label in labels]
    names = [literal(name) for name in names]
    ax.set_xticks([place for place, _ in labels], names, rotation=90 if turned else 0, fontsize=size)


@styled
def accuracy_over_time(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """The accuracy on every task while the tasks are learnt one after another, means over runs.

    A line per task, from dark (the first) to light, and the pretrained task dashed. The training of a task
    starts at the dotted line of its colour.

    Args:
        table: from :func:`lora_lens.experiments.continual_sweep`, of one strategy and method. Where the runs'
            orders differ, a line is a place in the order, whichever task stood there.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, there are no rows, or they are of several strategies, methods or
            sets of tasks.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")
        >>> middle = sweep.table.query("strategy == 'merged' and position == 0.5")
        >>> [text.get_text() for text in ll.plots.accuracy_over_time(middle).get_legend().get_texts()][-1]
        'retained task'
    """
    rows = of_one_method(table)
    names = _task_names(rows)
    colours = colormaps["viridis"](np.linspace(0, 0.9, len(names)))
    for (place, group), name, colour, marker in zip(
        rows.groupby("place"), names, colours, cycle(MARKERS), strict=False
    ):
        ax.axvline(place, color=colour, linestyle=":", linewidth=1.4, zorder=0, label="_start")
        look = {"color": colour, "marker": marker, "markersize": 6, "label": shortened(name)}
        _line_in_band(ax, group, "after", "accuracy", look)
    if _retained(rows) is not None:
        once = rows.drop_duplicates(["run", "after"])
        look = {"color": RETAINED, "linestyle": "--", "label": "retained task"}
        _line_in_band(ax, once, "after", "retained_accuracy", look)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.yaxis.set_major_formatter(PERCENT)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(xlabel="tasks learnt", ylabel="test accuracy (%)", title=_title(ax, rows))
    return ax


@styled
def window_survival(
    drifts: pd.DataFrame, table: pd.DataFrame, measure: str = "block_change", *, ax: Axes
) -> Axes:
    """What is left of the first task's window while more tasks are learnt: means over layers and runs.

    Lines are coloured by the window's position and dashed by strategy, in 95% bands over runs.

    Args:
        drifts: from :meth:`lora_lens.experiments.ContinualSweep.drifts`.
        table: the same runs, from :func:`lora_lens.experiments.continual_sweep`.
        measure: block_change, 0 where what the first task's window does is untouched; or overlap_left or
            overlap_right, the mean squared cosine between the subspace of the window as it stood after the
            first task and that of the window at the same place now, in [0, 1], on the output's or the
            input's side.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``measure``, a column is missing, no drift is of a window placed by position, or
            the runs of a strategy and method differ in a setting.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")
        >>> merged = sweep.only("strategy == 'merged' and method == 'window'")
        >>> ll.plots.window_survival(merged.drifts(), merged.table).get_ylabel()
        'change of what the first window does'
    """
    choice(measure, "measure", MEASURES)
    runs = drifts_by_run(drifts, table, measure)
    runs = runs[placed_windows(runs)].dropna(subset=[measure])
    if runs.empty:
        raise InputError("none of the drifts is of a window placed by position in a run of the table")
    _draw_drifts(ax, runs, measure)
    ax.set(ylabel=MEASURES[measure] + (" (0 to 1)" if measure != "block_change" else ""))
    ax.set_title("What is left of the first task's window")
    return ax


@styled
def update_over_time(drifts: pd.DataFrame, table: pd.DataFrame, *, ax: Axes) -> Axes:
    """How far the weights have moved from the pretrained ones, task by task: means over layers and runs.

    The norm of the update relative to that of the pretrained weight. Windows are coloured by position, other
    methods have hollow markers; dashes tell strategies apart. Bands are 95% intervals over runs.

    Args:
        drifts: from :meth:`lora_lens.experiments.ContinualSweep.drifts`.
        table: the same runs, from :func:`lora_lens.experiments.continual_sweep`.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, no run of the table has a drift, or the runs of a strategy and method
            differ in a setting.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")
        >>> merged = sweep.only("strategy == 'merged' and method == 'window'")
        >>> ll.plots.update_over_time(merged.drifts(), merged.table).get_ylabel()
        'update, ||dW|| / ||W||'
    """
    runs = drifts_by_run(drifts, table, "update").dropna(subset=["update"])
    if runs.empty:
        raise InputError("none of the table's runs has a drift; pass sweep.drifts()")
    _draw_drifts(ax, runs, "update")
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.set(ylabel="update, ||dW|| / ||W||", title="How far the weights have moved")
    return ax


def _draw_drifts(ax: Axes, runs: pd.DataFrame, measure: str) -> None:
    placed = placed_windows(runs)
    dashes = dict(zip(runs["strategy"].unique(), cycle(LINES), strict=False))
    markers = cycle(OTHER_MARKERS)
    handles = []
    if placed.any():
        position_bar(ax)
        several = len(dashes) > 1 or not placed.all()
        handles = [
            Line2D([], [], color="0.5", linestyle=dashes[s], label=shortened(f"{s}: windows"))
            for s in runs.loc[placed, "strategy"].unique()
            if several
        ]
    for _, group in runs[placed].groupby(METHOD, dropna=False, sort=False):
        strategy, position = group[["strategy", "position"]].iloc[0]
        look = {"color": position_colour(position), "linestyle": dashes[strategy], "marker": "o"}
        _line_in_band(ax, group, "after", measure, look | {"markersize": 4, "label": "_window"})
    for _, group in runs[~placed].groupby(METHOD, dropna=False, sort=False):
        (name,) = method_names(group.head(1))
        look = {"color": OTHERS, "linestyle": dashes[group["strategy"].iloc[0]], "marker": next(markers)}
        _line_in_band(
            ax,
            group,
            "after",
            measure,
            look | {"markersize": 7, "markerfacecolor": "white", "label": shortened(name)},
        )
        handles.append(ax.lines[-1])
    if handles:
        ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="tasks learnt")


def _line_in_band(ax: Axes, rows: pd.DataFrame, x: str, y: str, look: dict[str, object]) -> None:
    """The mean of ``y`` over runs at every ``x``, in its 95% interval; nothing where there are no values."""
    values = rows[[x, y]].dropna(subset=[y]).groupby(x)[y]
    line = pd.DataFrame({at: mean_and_interval("mean", ys) for at, ys in values}).T
    if line.empty:
        return
    if line["mean_low"].notna().any():
        ends = line["mean_low"].to_numpy(), line["mean_high"].to_numpy()
        ax.fill_between(line.index, *ends, color=look["color"], alpha=0.18, linewidth=0)
    ax.plot(line.index, line["mean"], **look)


def _task_names(rows: pd.DataFrame) -> list[str]:
    """The tasks by place: their names, or where orders differ "1st task", "2nd task", ..."""
    by_place = rows.groupby("place")["task"].unique()
    if all(len(tasks) == 1 for tasks in by_place):
        return [str(tasks[0]) for tasks in by_place]
    return [f"{_ordinal(place + 1)} task" for place in by_place.index]


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _retained(rows: pd.DataFrame) -> pd.Series | None:
    """The accuracy on the pretrained task by tasks learnt, from 0 on, means over runs; None without one."""
    once = rows.drop_duplicates(["run", "after"])
    if once["retained_before"].isna().all():
        return None
    later = once[once["after"] > 0].groupby("after")["retained_accuracy"].mean()
    return pd.concat([pd.Series({0: once["retained_before"].mean()}), later])


def _title(ax: Axes, rows: pd.DataFrame) -> str:
    """Of what the picture is, in lines as wide as it."""
    (name,) = method_names(rows.head(1))
    runs = rows["run"].nunique()
    width = 72 * ax.get_window_extent().width / ax.figure.dpi  # points
    most = max(20, int(width / (0.55 * plt.rcParams["font.size"])))
    return literal(fill(name + (f", mean of {runs} runs" if runs > 1 else ""), most))
