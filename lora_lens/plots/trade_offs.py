"""Pictures of comparisons: what windows gain and lose where the comparison is fair, and how sure that is."""

from __future__ import annotations

from textwrap import fill, wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked, sweep_table
from lora_lens.forgetting.aggregate import pareto_front, seed_means
from lora_lens.forgetting.run_groups import WINDOW, groups, window_columns
from lora_lens.plots._scores import (
    OTHERS,
    PERCENT,
    POSITIONS,
    UNITS,
    WINDOWS,
    in_words,
    method_name,
    placed_windows,
    position_bar,
    position_colour,
    require_score,
    show_unit,
    with_unit,
)
from lora_lens.plots._style import house_style, literal, require_axes, styled

COLOURS = {
    "accuracy": "viridis",
    "retained_accuracy": "viridis",
    "forgetting": "rocket_r",
    "loss_rise": "rocket_r",
}
COLLAPSE = "#D55E00"
LONGEST = 34  # characters of a name in one line
IN_THE_PICTURE = 4  # more names than these stand in a legend below it
ROW = 0.26  # inches that a row of the surface takes if it may
READABLE = 7  # points: the least height of a row that holds numbers


def surface(table: pd.DataFrame, score: str = "forgetting", *, ax: Axes | None = None) -> Axes:
    """A score over windows (rows) and learning rates (columns): means over seeds, in percentage points.

    The other methods of the table stand below the windows. A frame marks the rate at which a row has
    its highest accuracy on the new task.

    Args:
        table: from :func:`lora_lens.sweep`, with one value of every setting but window, rate and seed.
        score: accuracy, retained_accuracy, forgetting or loss_rise (in nats).
        ax: to draw on; what is written fits its height, and numbers are left out where rows are too low.
            Default a new pyplot figure, high enough for all rows.

    Raises:
        ValueError: another ``score``, a column is missing, the table is empty, or two runs share window, rate
            and seed.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.surface(sweep.table).get_ylabel()
        'window or method'
    """
    require_score(score)
    require_axes(ax)
    scores = list({score, "accuracy"})
    table = checked(table, [*WINDOW, "lr", "seed", *scores])
    keys = window_columns(table)
    means = _ordered(
        pd.DataFrame(
            [{**names, **group[scores].mean()} for names, group in groups(table, scores, by_rate=True)]
        )
    )
    means = means.assign(row=means.groupby(keys, dropna=False, sort=False).ngroup())
    grid, best = (means.pivot(index="row", columns="lr", values=values) for values in (score, "accuracy"))
    with house_style():
        if ax is None:
            wide, tall = plt.rcParams["figure.figsize"]
            ax = plt.subplots(figsize=(wide, max(tall, 1.2 + ROW * len(grid))))[1]
        names = _names(means.drop_duplicates("row"))
        _draw_surface(ax, grid, best, score, names, in_words(score, table))
    return ax


def _draw_surface(
    ax: Axes, grid: pd.DataFrame, best: pd.DataFrame, score: str, names: list[str], words: str
) -> None:
    in_nats = UNITS[score] == "nats"
    room = 72 * ax.get_window_extent().height / ax.figure.dpi / len(grid)  # points
    sns.heatmap(
        grid.to_numpy() * (1 if in_nats else 100),
        ax=ax,
        cmap=COLOURS[score],
        annot=bool(room >= READABLE),
        fmt=".2f" if in_nats else ".1f",
        annot_kws={"fontsize": min(plt.rcParams["font.size"], 0.8 * room)},
        cbar_kws={"label": f"{words} ({UNITS[score]})"},
        xticklabels=[f"{rate:g}" for rate in grid.columns],
        yticklabels=names,
    )
    frame = {"fill": False, "edgecolor": "black", "linewidth": min(2.2, room / 8), "clip_on": False}
    for row, accuracies in enumerate(best.to_numpy()):
        if np.isfinite(accuracies).any():
            place = (int(np.nanargmax(accuracies)), row)
            ax.add_patch(Rectangle(place, 1, 1, **frame))
    ax.set(xlabel="learning rate", ylabel="window or method", title=words.capitalize())
    lines = max(name.count("\n") for name in names) + 1
    size = min(plt.rcParams["font.size"], 0.8 * room / lines)
    ax.tick_params(axis="y", rotation=0, labelsize=size)
    ax.grid(False)


@styled
def comparison(result: pd.DataFrame, score: str = "forgetting", *, ax: Axes) -> Axes:
    """A score against the window's position with its 95% interval, from a function of
    ``ll.forgetting``, such as ``ll.forgetting.at_own_best_rate``.

    One line per rank of the windows. Other methods stand to their right, each under its name. Where fewer
    seeds than there are got to the place of the comparison (column reached), the marker is hollow; without
    any there is none.

    Args:
        result: one row per window or method with ``score``, and with ``score`` + _low and _high.
        score: any for which the result has these columns: accuracy, forgetting, loss_rise.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``score``, a column is missing, there are no rows, or a window or method has
            several.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.comparison(ll.forgetting.at_own_best_rate(sweep.table)).get_ylabel()
        'forgetting (percentage points)'
    """
    require_score(score)
    columns = [*WINDOW, "seeds", score, f"{score}_low", f"{score}_high"]
    result = checked(result, columns, "the result", "a comparison of ll.forgetting, such as at_own_best_rate")
    keys = window_columns(result)
    if (twice := result.duplicated(keys)).any():
        row = result[twice].iloc[0]
        raise InputError(
            f"{row['method']} at position {row['position']} has several rows; choose one rate for each, such "
            "as result[result['lr'] == 0.005] or result[result['most_reached']]"
        )
    rows = _ordered(result)
    placed = placed_windows(rows)
    windows, others = rows[placed], rows[~placed]
    lines = windows.groupby([key for key in keys if key in ("rank", "variant")], dropna=False, sort=False)
    palette = [WINDOWS, *sns.color_palette("colorblind", lines.ngroups)[1:]]
    for (values, line), colour in zip(lines, palette, strict=False):
        name = ", ".join(
            f"rank {v:g}" if key == "rank" else str(v)
            for key, v in zip(lines.keys, values, strict=True)
            if pd.notna(v)
        )
        ax.plot(
            line["position"],
            line[score],
            color=colour,
            linewidth=1.2,
            alpha=0.5,
            zorder=1,
            label=literal(name),
        )
        for place, (_, row) in zip(line["position"], line.iterrows(), strict=True):
            _interval(ax, place, row, score, colour, "o")
    step = 0.12
    beside = [1 + step * (i + 1.2) for i in range(len(others))]
    for place, (_, row) in zip(beside, others.iterrows(), strict=True):
        _interval(ax, place, row, score, OTHERS, "D")
    names = [literal(_in_two_lines(name)) for name in _full_names(others)]
    ticks = POSITIONS if len(windows) else ()
    ax.set_xticks([*ticks, *beside], [*(f"{p:g}" for p in ticks), *names])
    for label in ax.get_xticklabels()[len(ticks) :]:
        label.set(rotation=90, fontsize=8.5)
    if len(windows) and len(others):
        ax.axvline(1 + 0.6 * step, color="0.8", linewidth=0.8)
        # By default the axis' name would stand below the longest of the turned names.
        ax.xaxis.set_label_coords(0.5, -0.12, transform=ax.get_xaxis_transform())
    if lines.ngroups > 1:
        ax.legend()
    ax.set(
        xlabel="position of the window" if len(windows) else "method",
        ylabel=with_unit(score, result),
        title=in_words(score, result).capitalize(),
    )
    show_unit(ax, score)
    return ax


def _interval(ax: Axes, place: float, row: pd.Series, score: str, colour: object, marker: str) -> None:
    """One mean with its interval, hollow where not all seeds got there."""
    if pd.isna(row[score]):
        return
    if pd.notna(row[f"{score}_low"]):
        ends = [row[f"{score}_low"], row[f"{score}_high"]]
        ax.plot([place] * 2, ends, color=colour, linewidth=2.2, label="_interval")
    whole = row.get("reached", row["seeds"]) == row["seeds"]
    face = colour if whole else "white"
    ax.plot(place, row[score], marker, color=colour, markerfacecolor=face, markersize=7, label="_mean")


@styled
def robustness(result: pd.DataFrame, *, ax: Axes) -> Axes:
    """The range of learning rates that cost little, per window, from ``ll.forgetting.rate_robustness``.

    The bar reaches from the lowest to the highest rate within the tolerance, the dot is the best rate, a
    cross the rate at which the window collapses. A pale bar is a lower bound: it ends where the grid does.

    Args:
        result: one row per window or method.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, or there are no rows.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.robustness(ll.forgetting.rate_robustness(sweep.table, tolerance=0.02)).get_xlabel()
        'learning rate'
    """
    columns = [*WINDOW, "best_lr", "lowest", "highest", "at_grid_end", "collapse"]
    result = checked(result, columns, "the result", "ll.forgetting.rate_robustness")
    rows = _ordered(result)
    bar = {"linewidth": 7, "solid_capstyle": "round"}
    for height, (_, row) in enumerate(rows.iterrows()):
        colour = WINDOWS if row["method"] == "window" else OTHERS
        paleness = 0.2 if row["at_grid_end"] else 0.45
        ax.plot([row["lowest"], row["highest"]], [height] * 2, color=colour, alpha=paleness, **bar)
        ax.plot(row["best_lr"], height, "o", color=colour, markersize=8)
        if pd.notna(row["collapse"]):
            ax.plot(row["collapse"], height, "x", color=COLLAPSE, markersize=9, markeredgewidth=2.2)
    rates = sorted({*rows["lowest"], *rows["highest"], *rows["best_lr"], *rows["collapse"].dropna()})
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(rates))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticklabels([f"{rate:g}" for rate in rates])
    ax.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    ax.set_yticks(range(len(rows)), _names(rows))
    ax.invert_yaxis()
    handles = [
        Line2D([], [], marker="o", linestyle="", color="0.3", markersize=8, label="best rate"),
        Line2D([], [], color="0.3", alpha=0.45, label="costs little", **bar),
    ]
    if rows["at_grid_end"].any():
        handles.append(Line2D([], [], color="0.3", alpha=0.2, label="at least: the grid ends here", **bar))
    if rows["collapse"].notna().any():
        cross = {"marker": "x", "linestyle": "", "color": COLLAPSE, "markersize": 9, "markeredgewidth": 2.2}
        handles.append(Line2D([], [], label="accuracy halves", **cross))
    _legend_below(ax, handles)
    ax.set(xlabel="learning rate", ylabel="window or method", title="Rates that cost little accuracy")
    return ax


@styled
def fronts_by_method(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """The trade-off that each window offers when its learning rate is chosen: means over seeds.

    A strong line joins the rates of a window that no other of its rates beats on both tasks (its Pareto
    front). A pale line joins all its rates from the lowest to the highest; it may leave the picture, which
    shows the fronts. Windows are coloured by position; other methods are dashed.

    Args:
        table: from :func:`lora_lens.sweep`.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, the table is empty, or two runs share window, rate and seed.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.fronts_by_method(sweep.table).get_ylabel()
        'accuracy on the retained task (%)'
    """
    table = sweep_table(table)
    keys = window_columns(table)
    groups(table, ["accuracy"])  # refuses two runs of a window, rate and seed
    means = _ordered(seed_means(table))
    rows = means.groupby(keys, dropna=False, sort=False)
    firsts = rows.head(1)
    others = firsts[firsts["method"] != "window"]
    dashed = dict(zip(others.index, sns.color_palette("bright", len(others)), strict=True))
    names = dict(zip(others.index, _names(others), strict=True))
    fronts = []
    for _, group in rows:
        group = group.sort_values("lr")
        front = group[pareto_front(group)].sort_values("accuracy")
        first = group.index.intersection(firsts.index)[0]
        if first in dashed:
            look = {"color": dashed[first], "linestyle": "--"}
        else:
            look = {"color": position_colour(group["position"].iloc[0])}
        pale = {"alpha": 0.3, "linewidth": 1, "marker": ".", "zorder": 1, "label": "_every rate"}
        ax.plot(group["accuracy"], group["retained_accuracy"], **look | pale)
        strong = {"linewidth": 1.8, "marker": "o", "markersize": 5, "label": names.get(first, "_front")}
        ax.plot(front["accuracy"], front["retained_accuracy"], **look | strong)
        fronts.append(front)
    _show_only(ax, pd.concat(fronts)[["accuracy", "retained_accuracy"]].to_numpy())
    if (firsts["method"] == "window").any():
        position_bar(ax)
    handles, _ = ax.get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.5", alpha=0.5, linewidth=1, marker=".", label="all rates"))
    if len(others) > IN_THE_PICTURE:
        _legend_below(ax, handles)
    else:
        ax.legend(handles=handles, loc="lower left")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PERCENT)
    ax.set(
        xlabel=with_unit("accuracy", table),
        ylabel=with_unit("retained_accuracy", table),
        title="What each window offers when its rate is chosen",
    )
    return ax


def _ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Windows first, by rank, position and start, then the other methods in the order of the table."""
    other = (rows["method"] != "window").rename("other")
    keys = [key for key in ("variant", "rank", "position", "start") if key in rows]
    order = pd.concat([other, rows[keys].where(~other)], axis=1).reset_index(drop=True)
    return rows.iloc[order.sort_values(["other", *keys], kind="stable").index].reset_index(drop=True)


def _names(rows: pd.DataFrame) -> list[str]:
    """What tells windows and methods apart: a window's position alone, if that does."""
    names = [
        name.removeprefix("window at ").removeprefix("window ") if method == "window" else name
        for name, method in zip(_full_names(rows), rows["method"], strict=True)
    ]
    return [literal(fill(name, LONGEST, max_lines=2, placeholder=" ...")) for name in names]


def _full_names(rows: pd.DataFrame) -> list[str]:
    several = [key for key in ("rank", "variant") if key in rows and rows[key].nunique() > 1]
    names = []
    for _, row in rows.iterrows():
        known = [key for key in several if pd.notna(row[key])]
        details = [f", {key} {row[key]:g}" if key == "rank" else f", {row[key]}" for key in known]
        names.append(method_name(row) + "".join(details))
    return names


def _in_two_lines(name: str) -> str:
    """The name in at most two lines, as narrow as they can be."""
    for width in range(8, LONGEST):
        if len(lines := wrap(name, width, break_long_words=False)) <= 2:
            return "\n".join(lines)
    return fill(name, LONGEST, max_lines=2, placeholder=" ...")


def _show_only(ax: Axes, points: np.ndarray) -> None:
    """Limits around ``points`` (n, 2), of which there may be one, or equal ones."""
    low, high = np.nanmin(points, axis=0), np.nanmax(points, axis=0)
    room = np.maximum(0.07 * (high - low), 0.005)
    ax.set(xlim=(low[0] - room[0], high[0] + room[0]), ylim=(low[1] - room[1], high[1] + room[1]))


def _legend_below(ax: Axes, handles: list[Line2D]) -> None:
    """In two columns under the axis label, however tall the Axes are."""
    under = ScaledTranslation(0, -0.6, ax.figure.dpi_scale_trans)  # inches
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": ax.transAxes + under}
    ax.legend(handles=handles, ncols=2, **place)
