"""Pictures of what training did inside: turned bases, where the update lies, what predicts forgetting."""

from __future__ import annotations

from textwrap import shorten

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import instance, share_matrix
from lora_lens.forgetting.predictors import OUTSIDE
from lora_lens.forgetting.run_groups import DRIFTS
from lora_lens.plots._scores import PERCENT, position_bar, position_colour, rate_markers
from lora_lens.plots._style import colour_bar, literal, styled
from lora_lens.spectrum.window import Window

SHARES = {
    "inside": "inside the window",
    "above": "between larger components",
    "below": "between smaller components",
    "mixed": "between window and others",
    "outside": "outside the old bases",
}
WINDOW = "#56B4E9"  # in full: a cycle's colours are looked up when the figure is drawn, after the style's end
SHARE_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#999999")
NO_POSITION = "#CC79A7"  # cividis holds every grey
FAINTEST = 1e-3  # |cos| below it looks like 0
LARGEST_LABEL = 10  # points
NEEDS = {
    "C0": "from the weights",
    "C1": "from features of the retained task",
    "0.6": "known without looking inside",
}  # by colour
COLOURS = dict.fromkeys(("relative_change", "cka_loss", "neighbours_lost"), "C1") | dict.fromkeys(
    OUTSIDE, "0.6"
)
MEASURES = {
    "relative_change": "change of the features",
    "cka_loss": "1 - CKA of the features",
    "neighbours_lost": "nearest neighbours lost",
    "update": "update, ||dW||",
    "relative": "relative update, ||dW|| / ||W||",
    "first_left": "turn of the first 10 left vectors",
    "first_right": "turn of the first 10 right vectors",
    "turned_left": "turn of all left vectors",
    "turned_right": "turn of all right vectors",
    "intruders": "intruder dimensions",
    "effective_rank": "effective rank of the update",
    "stable_rank": "stable rank of the update",
    "degrees_left": "largest angle, left (degrees)",
    "degrees_right": "largest angle, right (degrees)",
    "rotation": "rotation, part of the update",
    "stretch": "stretch, part of the update",
    **{share: f"share {words}" for share, words in SHARES.items()},
    "left_inside": "share with its output in the window",
    "right_inside": "share with its input in the window",
    "diagonal": "diagonal share",
    "lr": "learning rate",
    "position": "position of the window",
    "accuracy": "accuracy on the new task",
}


@styled
def rotation_matrix(turned: Tensor, window: Window | None = None, *, ax: Axes) -> Axes:
    """|cos| between singular vectors before (rows) and after (columns), from
    :func:`lora_lens.forgetting.turned`.

    A bright diagonal is a basis that stayed; what lies off it turned. Colours are logarithmic from 0.001.
    Lines mark the window's components.

    Args:
        turned: (components before, components after), in [0, 1].
        window: of which the ends are marked; default none.
        ax: to draw on; default a new pyplot figure.

    Raises:
        TypeError: ``turned`` holds no numbers or is a table, or ``window`` is no window.
        ValueError: ``turned`` is no matrix with entries in [0, 1], or the window does not fit.

    Example:
        >>> import lora_lens as ll, torch
        >>> ll.plots.rotation_matrix(torch.eye(8), ll.Window.middle(2)).get_title()
        'How far the basis turned'
    """
    cosines = share_matrix(turned, "turned", "ll.forgetting.turned")
    if window is not None:
        instance(window, Window, "window", "a Window, such as ll.Window.middle(8)")
    image = ax.imshow(np.maximum(cosines, FAINTEST), cmap="magma", norm=LogNorm(FAINTEST, 1))
    if window is not None:
        part = window.slice(len(cosines))
        for place in (part.start - 0.5, part.stop - 0.5):
            ax.axhline(place, color=WINDOW, linewidth=0.9)
            ax.axvline(place, color=WINDOW, linewidth=0.9)
    colour_bar(image, ax, "|cos| (log)")
    ax.set(xlabel="component after", ylabel="component before", title="How far the basis turned")
    ax.grid(False)
    return ax


@styled
def shares(drifts: pd.DataFrame, *, ax: Axes) -> Axes:
    """Between which components the updates lie, by the window's position: shares of ||dW||^2.

    Over all layers of all runs of a position: sum of the squares within, divided by the sum of all. The
    shares are those of :func:`lora_lens.forgetting.drift`.

    Args:
        drifts: from :meth:`lora_lens.Sweep.drifts`, with position merged from the table of runs; rows
            without a position (other methods) or an update are left out.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, or no rows are left.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> runs = sweep.table.query("method == 'window' and lr == 0.005")[["run", "position"]]
        >>> ll.plots.shares(sweep.drifts().merge(runs, on="run")).get_xlabel()
        'position of the window'
    """
    drifts = checked(drifts, ["position", "update", *SHARES], *DRIFTS)
    known = drifts[drifts["update"] > 0].dropna(subset=["position", *SHARES])
    if known.empty:
        raise InputError("no windows placed by position with a drift; merge position from the table of runs")
    squares = known[list(SHARES)].mul(known["update"] ** 2, axis=0).groupby(known["position"]).sum()
    parts = squares.div(squares.sum(axis=1), axis=0)
    bottom = np.zeros(len(parts))
    names = [f"{position:g}" for position in parts.index]
    for (column, label), colour in zip(SHARES.items(), SHARE_COLOURS, strict=True):
        ax.bar(names, parts[column], bottom=bottom, label=label, color=colour, width=0.8)
        bottom += parts[column].to_numpy()
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(
        xlabel="position of the window",
        ylabel="share of ||dW||\N{SUPERSCRIPT TWO} (%)",
        ylim=(0, 1),
        title="Where the updates lie",
    )
    ax.grid(axis="x", visible=False)
    longest = max(map(len, names)) + 1
    ax.tick_params(axis="x", labelsize=_label_size(ax, len(parts), "width", 0.65 * longest))
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, columnspacing=1.2)
    return ax


def _label_size(ax: Axes, count: int, side: str, ems: float) -> float:
    """In points: ``count`` names of ``ems`` times their size each have room along one side."""
    room = getattr(ax.get_window_extent(), side) / ax.figure.dpi * 72 / count
    return min(LARGEST_LABEL, room / ems)


@styled
def predictors(result: pd.DataFrame, *, ax: Axes) -> Axes:
    """How well each measure predicts forgetting: R^2 from :func:`lora_lens.forgetting.predict_forgetting`.

    Beside each bar stands the rank correlation. Negative R^2 are cut off at 0: worse than the mean. Thin
    lines are the 95% intervals, where the result has them.

    Args:
        result: one row per measure, with the columns measure, r2 and spearman.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, or there are no rows.

    Example:
        >>> import lora_lens as ll, pandas as pd
        >>> result = pd.DataFrame({"measure": ["update", "lr"], "r2": [0.8, 0.3], "spearman": [0.9, 0.5]})
        >>> ll.plots.predictors(result).get_title()
        'What predicts forgetting'
    """
    columns = ["measure", "r2", "spearman"]
    result = checked(result, columns, "the result", "ll.forgetting.predict_forgetting")
    rows = result.sort_values("r2")
    names = [literal(MEASURES.get(m, m)) for m in rows["measure"]]
    colours = [COLOURS.get(m, "C0") for m in rows["measure"]]
    ax.barh(names, rows["r2"].clip(lower=0), color=colours)
    size = _label_size(ax, len(rows), "height", 1.2)
    ends = rows["r2"].clip(lower=0)
    if {"r2_low", "r2_high"} <= set(rows):
        low, high = (rows[c].clip(lower=0) for c in ("r2_low", "r2_high"))
        ax.hlines(range(len(rows)), low, high, color="0.25", linewidth=1)
        ends = np.maximum(ends, high)
    for height, (end, correlation) in enumerate(zip(ends, rows["spearman"], strict=True)):
        words = f"\N{GREEK SMALL LETTER RHO} = {correlation:+.2f}"
        ax.text(end + 0.01, height, words, va="center", fontsize=min(8, size))
    ax.tick_params(axis="y", labelsize=size)
    ax.set(xlim=(0, 1.15), xlabel="cross-validated R\N{SUPERSCRIPT TWO}", title="What predicts forgetting")
    ax.set_xticks(np.linspace(0, 1, 6))
    ax.grid(axis="y", visible=False)
    patches = [Patch(color=colour, label=label) for colour, label in NEEDS.items() if colour in colours]
    ax.legend(handles=patches, loc="lower right", fontsize=8.5)  # where the shortest bars are
    return ax


@styled
def against_forgetting(table: pd.DataFrame, measures: pd.DataFrame, measure: str, *, ax: Axes) -> Axes:
    """Forgetting against one measure, one point per run: colour is position, shape the learning rate.

    Windows without a position are pink; other methods are hollow. Both are named where there are any.

    Args:
        table: from :func:`lora_lens.sweep`.
        measures: from :func:`lora_lens.forgetting.by_run`.
        measure: one of its columns.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: a column is missing, or no run of the table has a value of the measure.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> measures = ll.forgetting.by_run(sweep.drifts())
        >>> ll.plots.against_forgetting(sweep.table, measures, "relative_change").get_xlabel()
        'change of the features'
    """
    table = checked(table, ["run", "method", "position", "lr", "forgetting"], once=True)
    instance(measure, str, "measure", "a column of the measures, such as 'relative'")
    measures = checked(measures, ["run", measure], "the table of measures", "ll.forgetting.by_run", once=True)
    runs = table.merge(measures[["run", measure]].dropna(), on="run")
    if runs.empty:
        raise InputError(
            f"none of the table's runs has a value of {measure}; pass the measures of the same table"
        )
    handles = []
    for rate, marker in rate_markers(runs["lr"]).items():
        for window, group in runs[runs["lr"] == rate].groupby(runs["method"] == "window"):
            colours = [position_colour(p, NO_POSITION) for p in group["position"]] if window else "none"
            edge = "white" if window else "0.3"
            ax.scatter(
                group[measure], group["forgetting"], c=colours, marker=marker, s=34,
                edgecolor=edge, linewidth=0.6,
            )  # fmt: skip
        handles.append(Line2D([], [], color="0.4", marker=marker, linestyle="", label=f"{rate:g}"))
    others = sorted(set(runs["method"]) - {"window"})
    if others:
        name = others[0] if len(others) == 1 else "other methods"
        hollow = {"markerfacecolor": "none", "markeredgecolor": "0.3"}
        handles.append(Line2D([], [], marker="o", linestyle="", label=literal(shorten(name, 24)), **hollow))
    if runs.loc[runs["method"] == "window", "position"].isna().any():
        handles.append(Line2D([], [], color=NO_POSITION, marker="o", linestyle="", label="no position"))
    ax.legend(handles=handles, title="learning rate", loc="best")
    position_bar(ax)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set(xlabel=literal(MEASURES.get(measure, measure)), ylabel="forgetting (percentage points)", title="")
    return ax
