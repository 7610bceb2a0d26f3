"""Pictures of runs and of sweeps: what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle
from textwrap import shorten

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lora_lens.metrics import pareto_front, seed_means
from lora_lens.plot_style import colour_bar, styled
from lora_lens.training import Run

REFERENCE_LINES = {"LoRA": "--", "full fine-tuning": ":"}
MORE_LINES = ("-.", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 4)), (0, (9, 4)))  # other placements than one window
LONGEST_LABEL = 44  # characters
RATE_MARKERS = "osD^vP*X"


@styled
def learning_curve(run: Run, *, ax: Axes) -> Axes:
    """Accuracy on the new and on the retained task along one run."""
    for column, label, marker in (
        ("accuracy", "new task", "o"),
        ("retained_accuracy", "retained task", "s"),
    ):
        if run.curve[column].notna().any():
            ax.plot(run.curve["step"], run.curve[column], marker=marker, label=label)
    ax.set(
        xlabel="step",
        ylabel="test accuracy",
        ylim=(0, 1.02),
        title=f"One run at learning rate {run.config.lr:g}",
    )
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    ax.legend()
    return ax


@styled
def forgetting_curve(table: pd.DataFrame, rates: Collection[float] | None = None, *, ax: Axes) -> Axes:
    """Forgetting against the window's position; see :func:`accuracy_curve` for how to read it."""
    _against_position(table, "forgetting", rates, ax)
    ax.set(ylabel="forgetting (percentage points)", title="What is lost: forgetting of the retained task")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return ax


@styled
def accuracy_curve(table: pd.DataFrame, rates: Collection[float] | None = None, *, ax: Axes) -> Axes:
    """Accuracy on the new task against the window's position, from a sweep's table.

    One line per learning rate: the mean over seeds, in a band from the lowest
    to the highest seed. Flat lines are ordinary LoRA (dashed), full
    fine-tuning (dotted) and other placements at the same rate, as far as the
    table holds them.
    ``rates`` picks the learning rates to draw, all by default; each looks the
    same in every choice.
    """
    _against_position(table, "accuracy", rates, ax)
    ax.set(ylabel="test accuracy (%)", title="What is gained: accuracy on the new task")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return ax


def _against_position(table: pd.DataFrame, score: str, chosen: Collection[float] | None, ax: Axes) -> None:
    swept = table[table["method"] == "window"].dropna(subset=["position"])
    if swept.empty:
        raise ValueError("the table has no runs of windows placed by position")
    rates = sorted(table["lr"].unique())
    colours = dict(zip(rates, sns.color_palette("colorblind", len(rates)), strict=True))
    lines = _reference_lines(table)
    for rate, marker in zip(rates, RATE_MARKERS * len(rates), strict=False):
        if chosen is not None and rate not in chosen:
            continue
        by_position = swept[swept["lr"] == rate].groupby("position")[score]
        mean = by_position.mean()
        ax.fill_between(
            mean.index, by_position.min(), by_position.max(), color=colours[rate], alpha=0.2, linewidth=0
        )
        ax.plot(mean.index, mean, color=colours[rate], marker=marker, label=f"{rate:g}")
        for name, line in lines.items():
            reference = table.loc[(table["method"] == name) & (table["lr"] == rate), score].mean()
            if pd.notna(reference):
                ax.axhline(reference, color=colours[rate], linestyle=line, linewidth=1.3)
    for position, name, side in ((0, "PiSSA", "left"), (1, "MiLoRA", "right")):
        ax.axvline(position, color="0.6", linewidth=0.8, zorder=0)
        place = {"transform": ax.get_xaxis_transform(), "ha": side, "va": "top"}
        ax.text(position, 1.0, f" {name} ", color="0.35", fontsize=9.5, **place)
    ax.set(xlabel="position of the window (0 = largest components, 1 = smallest)", xlim=(-0.04, 1.04))
    ax.margins(y=0.12)
    handles, _ = ax.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="0.3", linestyle=line, linewidth=1.3, label=_short(name))
        for name, line in lines.items()
    ]
    ax.legend(handles=handles, title="learning rate", loc="center left", bbox_to_anchor=(1, 0.5))


def _reference_lines(table: pd.DataFrame) -> dict[str, object]:
    """A line style for every method that has no position, baselines first."""
    methods = [m for m in table["method"].unique() if m not in ("window", "linear probe", *REFERENCE_LINES)]
    known = {name: line for name, line in REFERENCE_LINES.items() if (table["method"] == name).any()}
    return known | dict(zip(methods, cycle(MORE_LINES), strict=False))


def _short(name: str) -> str:
    return shorten(name, LONGEST_LABEL, placeholder=" ...")


@styled
def tradeoff(table: pd.DataFrame, rates: Collection[float] | None = None, *, ax: Axes) -> Axes:
    """The trade-off plane: accuracy on the retained task against accuracy on the new one.

    One point per method and learning rate (mean over seeds): filled by
    position for windows, hollow for baselines, shaped by learning rate. The
    line joins the points that no other beats in both (the Pareto front).
    ``rates`` picks the learning rates to draw, all by default; each looks the
    same in every choice, and the front is that of the chosen.
    """
    means = seed_means(table)
    every_rate = sorted(means["lr"].unique())
    markers = dict(zip(every_rate, RATE_MARKERS * len(every_rate), strict=False))
    baselines = [m for m in means["method"].unique() if m != "window"]
    edges = dict(zip(baselines, sns.color_palette("bright", len(baselines)), strict=True))

    rates = every_rate if rates is None else sorted(rates)
    means = means[means["lr"].isin(rates)]
    front = means[pareto_front(means)].sort_values("accuracy")
    ax.step(front["accuracy"], front["retained_accuracy"], where="pre", color="0.55", linewidth=1.3, zorder=1)
    colour_scale = ScalarMappable(plt.Normalize(0, 1), "cividis")
    for row in means.itertuples():
        if row.method == "window":
            colour = colour_scale.to_rgba(row.position) if pd.notna(row.position) else "0.5"
            look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6, "zorder": 3}
        else:
            look = {"facecolor": "white", "edgecolor": edges[row.method], "linewidth": 1.6, "zorder": 2}
        ax.scatter(row.accuracy, row.retained_accuracy, marker=markers[row.lr], s=52, **look)
    colour_bar(colour_scale, ax, "position of the window")

    plain = {"linestyle": "", "color": "0.3"}
    handles = [Line2D([], [], marker=markers[r], label=f"rate {r:g}", **plain) for r in rates]
    hollow = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.6}
    handles += [Line2D([], [], markeredgecolor=edges[b], label=_short(b), **hollow) for b in baselines]
    handles.append(Line2D([], [], color="0.55", linewidth=1.3, label="Pareto front"))
    ax.legend(handles=handles, loc="best")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1, symbol=""))
    ax.set(
        xlabel="accuracy on the new task (%)",
        ylabel="accuracy on the retained task (%)",
        title="The trade-off: up and to the right is better",
    )
    return ax
