"""Pictures of what training did inside: turned bases, where the update lies, what predicts forgetting."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from lora_lens.plot_style import colour_bar, styled
from lora_lens.tradeoffs import require_columns
from lora_lens.window import Window

SHARES = {
    "inside": "inside the window",
    "above": "between larger components",
    "below": "between smaller components",
    "mixed": "between window and others",
    "outside": "outside the old bases",
}
SHARE_COLOURS = ("#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#999999")
FAINTEST = 1e-3  # |cos| below it looks like 0
RATE_MARKERS = "osD^vP*X"
MEASURES = {
    "relative_change": "change of the features",
    "cka_loss": "1 - CKA of the features",
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
    """|cos| between singular vectors before (rows) and after (columns), from ``ll.rotation.turned``.

    A bright diagonal is a basis that stayed; what lies off it turned. Colours are logarithmic from 0.001.
    Lines mark the window's components.
    """
    matrix = turned.numpy()
    image = ax.imshow(np.maximum(matrix, FAINTEST), cmap="magma", norm=LogNorm(FAINTEST, 1))
    if window is not None:
        part = window.slice(len(matrix))
        for place in (part.start - 0.5, part.stop - 0.5):
            ax.axhline(place, color="C5", linewidth=0.9)
            ax.axvline(place, color="C5", linewidth=0.9)
    colour_bar(image, ax, "|cos| (log)")
    ax.set(xlabel="component after", ylabel="component before", title="How far the basis turned")
    ax.grid(False)
    return ax


@styled
def shares(drifts: pd.DataFrame, *, ax: Axes) -> Axes:
    """Between which components the updates lie, by the window's position: shares of ||dW||^2.

    Over all layers of all runs of a position: sum of the squares within, divided by the sum of all. The
    shares are those of :func:`lora_lens.drift`.

    Args:
        drifts: from :func:`lora_lens.drifts`, with position merged from the table of runs; rows without a
            position (other methods) are left out.
    """
    require_columns(drifts, ["position", "update", *SHARES])
    known = drifts.dropna(subset=["position", *SHARES])
    if known.empty:
        raise ValueError("no windows placed by position with a drift; merge position from the table of runs")
    squares = known[list(SHARES)].mul(known["update"] ** 2, axis=0).groupby(known["position"]).sum()
    parts = squares.div(squares.sum(axis=1), axis=0)
    bottom = np.zeros(len(parts))
    names = [f"{position:g}" for position in parts.index]
    for (column, label), colour in zip(SHARES.items(), SHARE_COLOURS, strict=True):
        ax.bar(names, parts[column], bottom=bottom, label=label, color=colour, width=0.8)
        bottom += parts[column].to_numpy()
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    ax.set(
        xlabel="position of the window",
        ylabel="share of ||dW||\N{SUPERSCRIPT TWO} (%)",
        title="Where the updates lie",
    )
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


@styled
def predictors(result: pd.DataFrame, *, ax: Axes) -> Axes:
    """How well each measure predicts forgetting: cross-validated R^2, from ``ll.predictors``.

    Beside each bar stands the rank correlation. Negative R^2 are cut off at 0: worse than the mean.
    """
    require_columns(result, ["measure", "r2", "spearman"])
    rows = result.sort_values("r2")
    names = [MEASURES.get(m, m) for m in rows["measure"]]
    known = {"lr", "position", "accuracy"}  # set or seen without looking inside
    colours = ["0.6" if m in known else "C0" for m in rows["measure"]]
    ax.barh(names, rows["r2"].clip(lower=0), color=colours)
    for height, row in enumerate(rows.itertuples()):
        ax.text(
            max(row.r2, 0) + 0.01,
            height,
            f"\N{GREEK SMALL LETTER RHO} = {row.spearman:+.2f}",
            va="center",
            fontsize=8,
        )
    room = ax.get_window_extent().height / ax.figure.dpi * 72 / len(rows)  # points for a name
    ax.tick_params(axis="y", labelsize=min(10, 0.85 * room))
    ax.set(xlim=(0, 1.15), xlabel="cross-validated R\N{SUPERSCRIPT TWO}", title="What predicts forgetting")
    ax.grid(axis="y", visible=False)
    return ax


@styled
def against_forgetting(table: pd.DataFrame, measures: pd.DataFrame, measure: str, *, ax: Axes) -> Axes:
    """Forgetting against one measure, one point per run: colour is position, shape the learning rate.

    Args:
        table: from :func:`lora_lens.sweep`.
        measures: from :func:`lora_lens.predictors.by_run`.
        measure: one of its columns.
    """
    require_columns(measures, ["run", measure])
    runs = table.merge(measures[["run", measure]], on="run")
    scale = ScalarMappable(Normalize(0, 1), "cividis")
    rates = sorted(runs["lr"].unique())
    for rate, marker in zip(rates, RATE_MARKERS * len(rates), strict=False):
        for window, group in runs[runs["lr"] == rate].groupby(runs["method"] == "window"):
            colours = scale.to_rgba(group["position"].fillna(0.5)) if window else "none"
            edge = "white" if window else "0.3"
            label = f"{rate:g}" if window else None
            ax.scatter(
                group[measure], group["forgetting"], c=colours, marker=marker, s=34,
                edgecolor=edge, linewidth=0.6, label=label,
            )  # fmt: skip
    legend = ax.legend(title="learning rate", loc="upper left")
    for handle in legend.legend_handles:
        handle.set_facecolor("0.4")
    colour_bar(scale, ax, "position of the window")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    ax.set(xlabel=MEASURES.get(measure, measure), ylabel="forgetting (percentage points)", title="")
    return ax
