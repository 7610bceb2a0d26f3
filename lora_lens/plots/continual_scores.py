"""Pictures of continual learning as a whole: what each strategy and method learnt and forgot in the end.

Scores are those of :func:`lora_lens.experiments.continual.continual_scores`; their means over orders and
seeds and the 95% intervals are those of :func:`lora_lens.experiments.continual.score_means`. A single run has
none.
"""

from __future__ import annotations

from itertools import cycle
from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import choice
from lora_lens.experiments.continual.metrics import continual_scores, score_means
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
    method_names,
    name_of_windows,
    require_one_setting,
)
from lora_lens.plots._style import house_style, require_axes, styled

SCORES = {
    "average_accuracy": "average accuracy (%)",
    "retained_accuracy": "accuracy on the retained task (%)",
    "learning_accuracy": "accuracy right after learning (%)",
    "average_forgetting": "average forgetting (percentage points)",
    "retained_forgetting": "forgetting of the retained task (percentage points)",
    "backward_transfer": "backward transfer (percentage points)",
    "forward_transfer": "forward transfer (percentage points)",
    "intransigence": "intransigence (percentage points)",
}
LOST = ("average_forgetting", "retained_forgetting")
WIDEST = 40  # characters in a line of a label
FEW = 10  # entries of a legend
ROW = 0.2  # inches of a row of the legend below a picture


def continual_tradeoff(
    scores: pd.DataFrame, score: str = "average_forgetting", *, ax: Axes | None = None
) -> Axes:
    """What each strategy and method learnt against what it forgot: up and to the right is better.

    Across runs the average accuracy over all tasks at the end, upwards forgetting, which runs downwards.
    Bars are 95% intervals over orders and seeds. Windows are coloured by position, and a line joins those of
    one strategy; other methods are hollow, then
    filled and dark. Joint training forgets nothing, as it has no order: a vertical line
    at its accuracy, in a band as wide as its interval.

    Args:
        scores: from :func:`lora_lens.experiments.continual.continual_scores`, or a table of
            :func:`lora_lens.experiments.continual_sweep`; one learning rate and setting per strategy and
            method.
        score: average_forgetting, of the tasks learnt; or retained_forgetting, of the pretrained one.
        ax: to draw on; default a new pyplot figure with room for the legend below.

    Raises:
        ValueError: another ``score``, a column is missing, there are no runs, or those of a strategy and
            method differ in a setting.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")
        >>> windows = sweep.only("strategy in ('continued', 'merged') and method == 'window'")
        >>> ll.plots.continual_tradeoff(windows.scores()).get_xlabel()
        'average accuracy (%)'
    """
    choice(score, "score", LOST)
    require_axes(ax)
    means = _means(scores, ["average_accuracy", score])
    windows = means[placed_windows(means)]
    others = means[~placed_windows(means)].sort_values(METHOD[:3], kind="stable")
    rows = -(-(windows["strategy"].nunique() + len(others)) // 2)
    with house_style():
        if ax is None:
            wide, tall = plt.rcParams["figure.figsize"]
            ax = plt.subplots(figsize=(wide, tall + ROW * rows))[1]
        _draw_windows(ax, windows, score)
        _draw_others(ax, others, score)
        ax.xaxis.set_major_formatter(PERCENT)
        ax.yaxis.set_major_formatter(PERCENT)
        ax.invert_yaxis()
        # Left of the middle: what stands out to the right would push the colour bar away.
        ax.legend(loc="upper center", bbox_to_anchor=(0.44, -0.17), ncols=2, **_legend_look(2 * rows))
        ax.set(
            xlabel=SCORES["average_accuracy"],
            ylabel=fill(SCORES[score], WIDEST),
            title="Learning and forgetting: up and to the right is better",
        )
    return ax


def _draw_windows(ax: Axes, windows: pd.DataFrame, score: str) -> None:
    lines = windows.sort_values("position").groupby(["strategy", "rank"], sort=False)
    several_ranks = windows["rank"].nunique() > 1
    for ((strategy, rank), line), marker in zip(lines, cycle(MARKERS), strict=False):
        ax.plot(line["average_accuracy"], line[score], color="0.6", linewidth=1, zorder=1, label="_windows")
        name = name_of_windows(strategy, rank, several_ranks)
        look = {"markersize": 8, "markeredgecolor": "white", "markeredgewidth": 0.6, "zorder": 3}
        for _, row in line.iterrows():
            colour = position_colour(row["position"])
            _cross(ax, row, score, colour)
            ax.plot(row["average_accuracy"], row[score], marker, color=colour, label="_window", **look)
        ax.plot([], [], marker, color="0.5", label=shortened(name), **look)
    if len(windows):
        position_bar(ax)


def _draw_others(ax: Axes, others: pd.DataFrame, score: str) -> None:
    looks = cycle((marker, face) for face in ("white", OTHERS, "0.75") for marker in OTHER_MARKERS)
    lines = cycle(LINES)
    # One for every method, drawn or not, so that it looks alike in the pictures of both scores.
    for name, (_, row), (marker, face) in zip(method_names(others), others.iterrows(), looks, strict=False):
        if np.isfinite(row[score]):
            _cross(ax, row, score, OTHERS)
            look = {
                "markerfacecolor": face,
                "markeredgecolor": OTHERS,
                "markeredgewidth": 1.4,
                "markersize": 8,
            }
            ax.plot(row["average_accuracy"], row[score], marker, label=shortened(name), zorder=4, **look)
        elif np.isfinite(row["average_accuracy"]):
            line = {"color": OTHERS, "linestyle": next(lines), "linewidth": 1.3, "zorder": 0}
            ax.axvline(row["average_accuracy"], label=shortened(name), **line)
            if np.isfinite(row["average_accuracy_low"]):
                ends = row["average_accuracy_low"], row["average_accuracy_high"]
                ax.axvspan(*ends, color=OTHERS, alpha=0.1, linewidth=0, zorder=0)


def _cross(ax: Axes, row: pd.Series, score: str, colour: object) -> None:
    """The intervals of both scores of one point."""
    look = {"color": colour, "linewidth": 1.3, "alpha": 0.5, "zorder": 2, "label": "_interval"}
    across = [row["average_accuracy_low"], row["average_accuracy_high"]]
    upwards = [row[f"{score}_low"], row[f"{score}_high"]]
    if np.isfinite(across).all():
        ax.plot(across, [row[score]] * 2, **look)
    if np.isfinite(upwards).all():
        ax.plot([row["average_accuracy"]] * 2, upwards, **look)


@styled
def forgetting_by_position(scores: pd.DataFrame, score: str = "average_forgetting", *, ax: Axes) -> Axes:
    """A score of continual learning against the window's position, one line per strategy.

    Bands are 95% intervals over orders and seeds. Methods without a position are flat lines in their
    strategy's colour, dashed by method; their intervals stand to the right.

    Args:
        scores: as for :func:`continual_tradeoff`.
        score: average_forgetting, retained_forgetting, average_accuracy or another of SCORES.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: as :func:`continual_tradeoff`, or no run of a window placed by position.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.experiments.ContinualSweep.open("data/results/split_fashion.jsonl.xz")
        >>> simple = sweep.only("strategy in ('merged', 'continued') and method in ('window', 'LoRA')")
        >>> ll.plots.forgetting_by_position(simple.scores()).get_title()
        'Average forgetting'
    """
    choice(score, "score", SCORES)
    means = _means(scores, [score])
    windows, others = means[placed_windows(means)], means[~placed_windows(means)].dropna(subset=[score])
    if windows.empty:
        raise InputError("the scores have no runs of windows placed by position")
    strategies = means["strategy"].unique()
    palette = dict(zip(strategies, sns.color_palette("colorblind", len(strategies)), strict=True))
    dashes = dict(zip(others["method"].unique(), cycle(LINES[1:]), strict=False))
    several_ranks = windows["rank"].nunique() > 1
    lines = windows.sort_values("position").groupby(["strategy", "rank"], sort=False)
    for ((strategy, rank), line), marker in zip(lines, cycle(MARKERS), strict=False):
        look = {"color": palette[strategy], "marker": marker}
        name = name_of_windows(strategy, rank, several_ranks)
        ends = line[f"{score}_low"], line[f"{score}_high"]
        ax.fill_between(line["position"], *ends, color=palette[strategy], alpha=0.18, linewidth=0)
        ax.plot(line["position"], line[score], label=shortened(name), **look)
    for i, (name, (_, row)) in enumerate(zip(method_names(others), others.iterrows(), strict=True)):
        colour, end = palette[row["strategy"]], 1.03 + 0.02 * i
        line = {"color": colour, "linestyle": dashes[row["method"]], "linewidth": 1.4}
        ax.plot([0, end], [row[score]] * 2, label=shortened(name), **line)
        ends = [row[f"{score}_low"], row[f"{score}_high"]]
        if np.isfinite(ends).all():
            ax.plot([end] * 2, ends, color=colour, linewidth=2.2, label="_interval")
    ax.set_xticks(np.linspace(0, 1, 5), ["0\nPiSSA", "0.25", "0.5", "0.75", "1\nMiLoRA"])
    ax.yaxis.set_major_formatter(PERCENT)
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), **_legend_look(lines.ngroups + len(others)))
    ax.set(
        xlabel="position of the window",
        ylabel=fill(SCORES[score], WIDEST),
        title=SCORES[score].split(" (")[0].capitalize(),
    )
    return ax


def _legend_look(entries: int) -> dict[str, float]:
    """Smaller letters for many entries."""
    return {"columnspacing": 1.2, **({"fontsize": 8} if entries > FEW else {})}


def _means(scores: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """One row per strategy and method: the means over orders and seeds of some scores, with intervals."""
    if isinstance(scores, pd.DataFrame) and "after" in scores:
        scores = continual_scores(scores)
    source = "ll.experiments.continual_sweep, or ll.experiments.continual.continual_scores,"
    scores = checked(scores, [*METHOD, *columns], source=source)
    require_one_setting(scores)
    return score_means(scores)
