"""Pictures of comparisons: what windows gain and lose where the comparison is fair, and how sure that is."""

from __future__ import annotations

from textwrap import fill, shorten

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, PercentFormatter

from lora_lens.metrics import seed_means
from lora_lens.plot_style import colour_bar, styled
from lora_lens.tradeoffs import require_columns

LABELS = {
    "accuracy": "accuracy on the new task",
    "retained_accuracy": "accuracy on the retained task",
    "forgetting": "forgetting",
}
COLOURS = {"accuracy": "viridis", "retained_accuracy": "viridis", "forgetting": "rocket_r"}
LONGEST = 34  # characters of a method's name


@styled
def surface(table: pd.DataFrame, score: str = "forgetting", *, ax: Axes) -> Axes:
    """A score over windows (rows) and learning rates (columns): means over seeds, in percentage points.

    The other methods of the table stand below the windows. A frame marks the rate at which a row has
    its highest accuracy on the new task.

    Args:
        table: from :func:`lora_lens.sweep`, of one rank and length of training.
        score: accuracy, retained_accuracy or forgetting.
    """
    grid = _by_row_and_rate(table, score)
    best = _by_row_and_rate(table, "accuracy").to_numpy()
    values = 100 * grid.to_numpy()
    sns.heatmap(
        values,
        ax=ax,
        cmap=COLOURS[score],
        annot=True,
        fmt=".1f",
        cbar_kws={"label": f"{LABELS[score]} (%)" if score != "forgetting" else "points forgotten"},
        xticklabels=[f"{rate:g}" for rate in grid.columns],
        yticklabels=[_row_name(method, position, start) for method, _, position, start in grid.index],
    )
    for row, scores in enumerate(best):
        if np.isfinite(scores).any():
            place = (int(np.nanargmax(scores)), row)
            ax.add_patch(Rectangle(place, 1, 1, fill=False, edgecolor="black", linewidth=2.2, clip_on=False))
    ax.set(xlabel="learning rate", ylabel="window or method", title=LABELS[score].capitalize())
    ax.tick_params(axis="y", rotation=0)
    ax.grid(False)
    return ax


@styled
def comparison(result: pd.DataFrame, score: str = "forgetting", *, ax: Axes) -> Axes:
    """A score against the window's position with its 95% interval, from a function of ``ll.tradeoffs``.

    Other methods stand to the right of the windows, each under its name. Where fewer seeds than there
    are got to the place of the comparison (column reached), the marker is hollow; without any there is none.

    Args:
        result: one row per window or method with ``score``, and with ``score`` + _low and _high.
        score: accuracy or forgetting.

    Raises:
        ValueError: a column is missing, or a window or method has several rows.
    """
    require_columns(result, ["method", "position", score, f"{score}_low", f"{score}_high"])
    if (twice := result.duplicated(["method", "rank", "position", "start"])).any():
        row = result[twice].iloc[0]
        raise ValueError(
            f"{row['method']} at position {row['position']} has several rows; choose one rate for each, such "
            "as result[result['lr'] == 0.005] or result[result['most_reached']]"
        )
    windows = result[(result["method"] == "window") & result["position"].notna()].sort_values("position")
    others = result.drop(windows.index)
    step = 0.12
    places = [*windows["position"], *(1 + step * (i + 1.2) for i in range(len(others)))]
    rows = pd.concat([windows, others])
    ax.plot(windows["position"], windows[score], color="C0", linewidth=1.2, alpha=0.5, zorder=1)
    for place, (_, row) in zip(places, rows.iterrows(), strict=True):
        if pd.isna(row[score]):
            continue
        colour = "C0" if row["method"] == "window" else "0.25"
        if pd.notna(row[f"{score}_low"]):
            ax.plot([place] * 2, [row[f"{score}_low"], row[f"{score}_high"]], color=colour, linewidth=2.2)
        whole = row.get("reached", row["seeds"]) == row["seeds"]
        face = colour if whole else "white"
        ax.plot(place, row[score], "o" if row["method"] == "window" else "D", color=colour, mfc=face, ms=7)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1, *places[len(windows) :]])
    names = [fill(shorten(str(m), LONGEST, placeholder=" ..."), LONGEST // 2) for m in others["method"]]
    ax.set_xticklabels(["0", "0.25", "0.5", "0.75", "1", *names])
    for label in ax.get_xticklabels()[5:]:
        label.set(rotation=90, fontsize=8.5)
    if len(others):
        ax.axvline(1 + 0.6 * step, color="0.8", linewidth=0.8)
    ax.set(xlabel="position of the window", ylabel=_with_unit(score), title=LABELS[score].capitalize())
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return ax


@styled
def robustness(result: pd.DataFrame, *, ax: Axes) -> Axes:
    """The range of learning rates that cost little, per window, from ``ll.tradeoffs.rate_robustness``.

    The bar reaches from the lowest to the highest rate within the tolerance, the dot is the best rate, a
    cross the rate at which the window collapses. An arrow says that the range ends at the grid's end.
    """
    require_columns(result, ["method", "position", "best_lr", "lowest", "highest", "at_grid_end", "collapse"])
    windows = result[result["method"] == "window"].sort_values("position")
    rows = pd.concat([windows, result.drop(windows.index)])
    for height, (_, row) in enumerate(rows.iterrows()):
        colour = "C0" if row["method"] == "window" else "0.35"
        ax.plot(
            [row["lowest"], row["highest"]], [height] * 2, color=colour, linewidth=7, alpha=0.45,
            solid_capstyle="round",
        )  # fmt: skip
        ax.plot(row["best_lr"], height, "o", color=colour, ms=8)
        if pd.notna(row["collapse"]):
            ax.plot(row["collapse"], height, "x", color="C3", ms=9, mew=2.2)
    rates = sorted({*rows["lowest"], *rows["highest"], *rows["best_lr"], *rows["collapse"].dropna()})
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(rates))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xticklabels([f"{rate:g}" for rate in rates])
    ax.set_xlim(rates[0] / 1.5, rates[-1] * 1.5)
    ax.set_yticks(range(len(rows)), [_row_name(r.method, r.position, r.start) for r in rows.itertuples()])
    ax.invert_yaxis()
    ax.set(xlabel="learning rate", ylabel="window or method", title="Rates that cost little accuracy")
    return ax


@styled
def fronts_by_method(table: pd.DataFrame, *, ax: Axes) -> Axes:
    """The trade-off that each window offers: means over seeds, joined from the lowest rate to the highest.

    Windows are coloured by position; other methods are dashed. Up and to the right is better.
    """
    means = seed_means(table).sort_values("lr")
    scale = ScalarMappable(Normalize(0, 1), "cividis")
    others = [m for m in means["method"].unique() if m != "window"]
    dashed = dict(zip(others, sns.color_palette("bright", len(others)), strict=True))
    windows = means.groupby(["method", "rank", "position", "start"], dropna=False, sort=False)
    for (method, _, position, _), group in windows:
        window = method == "window"
        look = {"color": scale.to_rgba(position)} if window else {"color": dashed[method], "ls": "--"}
        name = None if window else shorten(str(method), LONGEST, placeholder=" ...")
        ax.plot(
            group["accuracy"], group["retained_accuracy"], marker="o", ms=4, linewidth=1.6, label=name, **look
        )
    colour_bar(scale, ax, "position of the window")
    if others:
        ax.legend(loc="lower left")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))
    ax.set(
        xlabel="accuracy on the new task (%)",
        ylabel="accuracy on the retained task (%)",
        title="What each window offers, from rate to rate",
    )
    return ax


@styled
def by_setting(table: pd.DataFrame, setting: str, score: str = "forgetting", *, ax: Axes) -> Axes:
    """A score against the window's position, one line per value of another column, at one learning rate.

    Lines are means over seeds in a band from the lowest to the highest seed; flat lines of the same colour
    are ordinary LoRA.

    Args:
        table: runs at one learning rate that differ in ``setting``, such as rank, steps or targets.

    Raises:
        ValueError: the table has several rates, or lacks the column.
    """
    require_columns(table, [setting, "method", "position", "lr", score])
    if table["lr"].nunique() != 1:
        raise ValueError(
            f"one picture shows one learning rate, and the table has {sorted(table['lr'].unique())}"
        )
    values = sorted(table[setting].unique(), key=lambda v: (isinstance(v, str), v))
    for value, colour in zip(values, sns.color_palette("colorblind", len(values)), strict=True):
        group = table[table[setting] == value]
        by_position = group[group["method"] == "window"].groupby("position")[score]
        mean = by_position.mean()
        band = {"color": colour, "alpha": 0.18, "linewidth": 0}
        ax.fill_between(mean.index, by_position.min(), by_position.max(), **band)
        ax.plot(mean.index, mean, marker="o", color=colour, label=_setting_name(value))
        lora = group.loc[group["method"] == "LoRA", score].mean()
        if pd.notna(lora):
            ax.axhline(lora, color=colour, linestyle="--", linewidth=1.2)
    ax.legend(title="layers" if setting == "targets" else setting)
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    title = f"{LABELS[score].capitalize()} by {'layers' if setting == 'targets' else setting}"
    ax.set(xlabel="position of the window", ylabel=_with_unit(score), title=title)
    return ax


def _with_unit(score: str) -> str:
    return f"{LABELS[score]} ({'percentage points' if score == 'forgetting' else '%'})"


def _setting_name(value: object) -> str:
    """A list of layers by their kinds: "attn.qkv, attn.proj"."""
    if not isinstance(value, str):
        return f"{value:g}"
    kinds = dict.fromkeys(".".join(layer.split(".")[2:]) or layer for layer in value.split())
    return shorten(", ".join(kinds), LONGEST, placeholder=" ...")


def _by_row_and_rate(table: pd.DataFrame, score: str) -> pd.DataFrame:
    """Means over seeds, windows by position first, then the other methods; columns are rates."""
    if score not in LABELS:
        raise ValueError(f"score must be one of {', '.join(LABELS)}, not {score!r}")
    require_columns(table, ["method", "rank", "position", "start", "lr", "seed", score])
    means = table.groupby(["method", "rank", "position", "start", "lr"], dropna=False)[score].mean()
    grid = means.unstack("lr")
    order = sorted(grid.index, key=lambda names: (names[0] != "window", np.nan_to_num(names[2]), str(names)))
    return grid.loc[pd.MultiIndex.from_tuples(order, names=grid.index.names)]


def _row_name(method: str, position: float, start: float) -> str:
    if method != "window":
        return shorten(str(method), LONGEST, placeholder=" ...")
    return f"{position:g}" if pd.notna(position) else f"from {start:g}"
