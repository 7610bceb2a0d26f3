"""Pictures: each takes a table or spectra and an optional ``ax``, and returns matplotlib Axes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from lora_lens.layers import block_and_kind
from lora_lens.metrics import pareto_front, seed_means
from lora_lens.spectrum import Spectrum, SpectrumSet
from lora_lens.training import Run
from lora_lens.window import Window

STYLE = str(Path(__file__).with_name("lora_lens.mplstyle"))
REFERENCE_LINES = {"LoRA": "--", "full fine-tuning": ":"}
RATE_MARKERS = "osD^vP*X"
WINDOW_COLOUR = "#E69F00"


@contextmanager
def house_style() -> Iterator[None]:
    """Give figures that are made within it the look of all pictures here."""
    with plt.style.context(STYLE):
        try:
            yield
        finally:
            interactive = plt.isinteractive()
    # A notebook's backend is loaded by the first figure and turns interactive mode on. The end of
    # the style would turn it off again, and the notebook would show no figure after the first.
    matplotlib.interactive(interactive)


def _styled(draw: Callable[..., Axes]) -> Callable[..., Axes]:
    """Draw in the house style, on the given ``ax`` or on a new pyplot figure."""

    @wraps(draw)
    def styled(*arguments: object, ax: Axes | None = None, **options: object) -> Axes:
        with house_style():
            return draw(*arguments, ax=plt.subplots()[1] if ax is None else ax, **options)

    return styled


@_styled
def spectrum(spectra: SpectrumSet | Spectrum, window: Window | None = None, *, ax: Axes) -> Axes:
    """Singular values by component, one line per weight, one colour per kind, later blocks paler.

    A ``window`` is shaded where it lies on the widest spectrum.
    """
    weights = [spectra] if isinstance(spectra, Spectrum) else list(spectra.values())
    kinds = list(dict.fromkeys(block_and_kind(s.name)[1] for s in weights))
    colours = dict(zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True))
    blocks = sorted({block_and_kind(s.name)[0] for s in weights})
    for s in weights:
        block, kind = block_and_kind(s.name)
        paleness = 1 - 0.65 * (block - blocks[0]) / max(blocks[-1] - blocks[0], 1)
        values = s.singular_values.clamp_min(1e-12).numpy()
        ax.plot(values, color=colours[kind], alpha=paleness, linewidth=1.4)
    k = max(s.k for s in weights)
    if window is not None:
        part = window.slice(k)
        ax.axvspan(part.start - 0.5, part.stop - 0.5, color=WINDOW_COLOUR, alpha=0.3, linewidth=0)
    ax.set(
        yscale="log",
        xlim=(-0.5, k - 0.5),
        xlabel="component i (0 = largest)",
        ylabel="singular value",
        title=f"{weights[0].name}" if len(weights) == 1 else f"Spectra of {len(weights)} weights",
    )
    if len(kinds) > 1:
        handles = [Line2D([], [], color=c, label=kind) for kind, c in colours.items()]
        ax.legend(handles=handles, title="pale = late block" if len(blocks) > 1 else None)
    return ax


@_styled
def by_depth(table: pd.DataFrame, column: str = "effective_rank", *, ax: Axes) -> Axes:
    """One column of ``SpectrumSet.table()`` against the block, one line per kind."""
    sns.lineplot(
        table, x="block", y=column, hue="kind", style="kind", markers=True, dashes=False,
        palette=sns.color_palette("colorblind", table["kind"].nunique()), ax=ax,
    )  # fmt: skip
    ax.xaxis.get_major_locator().set_params(integer=True)
    name = column.replace("_", " ")
    ax.set(xlabel="block", ylabel=name, title=f"{name.capitalize()} by depth")
    sns.move_legend(ax, "center left", bbox_to_anchor=(1, 0.5), title=None)
    return ax


def decomposition(spectrum: Spectrum, window: Window, axes: np.ndarray | None = None) -> np.ndarray:
    """The weight, the slice that the window holds and the residual that stays, as three heat maps.

    Returns:
        The three Axes. The colours of weight and residual share one scale;
        the slice has its own, written in its title.
    """
    whole = spectrum.component(Window(spectrum.k, start=0)).numpy()
    part = spectrum.component(window).numpy()
    scale = np.abs(whole).max()
    with house_style():
        if axes is None:
            axes = plt.subplots(1, 3, figsize=(10, 3.4))[1]
        pictures = {
            "weight W": (whole, scale),
            "slice": (part, np.abs(part).max()),
            "residual W - slice": (whole - part, scale),
        }
        for ax, (title, (matrix, top)) in zip(axes, pictures.items(), strict=True):
            ax.imshow(matrix, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
            ax.set(title=f"{title}\n(colours ±{top:.2g})", xlabel="input feature")
            ax.title.set_fontsize(10.5)
            ax.grid(False)
        axes[0].set_ylabel("output feature")
    return axes


@_styled
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


@_styled
def forgetting_curve(table: pd.DataFrame, rates: Collection[float] | None = None, *, ax: Axes) -> Axes:
    """Forgetting against the window's position; see :func:`accuracy_curve` for how to read it."""
    _against_position(table, "forgetting", rates, ax)
    ax.set(ylabel="forgetting (percentage points)", title="What is lost: forgetting of the retained task")
    ax.yaxis.set_major_formatter(PercentFormatter(1, symbol=""))
    return ax


@_styled
def accuracy_curve(table: pd.DataFrame, rates: Collection[float] | None = None, *, ax: Axes) -> Axes:
    """Accuracy on the new task against the window's position, from a sweep's table.

    One line per learning rate: the mean over seeds, in a band from the lowest
    to the highest seed. Flat lines are ordinary LoRA (dashed) and full
    fine-tuning (dotted) at the same rate, as far as the table holds them.
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
    drawn = [name for name in REFERENCE_LINES if (table["method"] == name).any()]
    for rate, marker in zip(rates, RATE_MARKERS * len(rates), strict=False):
        if chosen is not None and rate not in chosen:
            continue
        by_position = swept[swept["lr"] == rate].groupby("position")[score]
        mean = by_position.mean()
        ax.fill_between(
            mean.index, by_position.min(), by_position.max(), color=colours[rate], alpha=0.2, linewidth=0
        )
        ax.plot(mean.index, mean, color=colours[rate], marker=marker, label=f"{rate:g}")
        for name in drawn:
            reference = table.loc[(table["method"] == name) & (table["lr"] == rate), score].mean()
            if pd.notna(reference):
                ax.axhline(reference, color=colours[rate], linestyle=REFERENCE_LINES[name], linewidth=1.3)
    for position, name, side in ((0, "PiSSA", "left"), (1, "MiLoRA", "right")):
        ax.axvline(position, color="0.6", linewidth=0.8, zorder=0)
        ax.text(
            position,
            1.0,
            f" {name} ",
            transform=ax.get_xaxis_transform(),
            ha=side,
            va="top",
            color="0.35",
            fontsize=9.5,
        )
    ax.set(xlabel="position of the window (0 = largest components, 1 = smallest)", xlim=(-0.04, 1.04))
    ax.margins(y=0.12)
    handles, _ = ax.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="0.3", linestyle=REFERENCE_LINES[n], linewidth=1.3, label=n) for n in drawn
    ]
    ax.legend(handles=handles, title="learning rate", loc="center left", bbox_to_anchor=(1, 0.5))


@_styled
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
    colour_scale = plt.cm.ScalarMappable(plt.Normalize(0, 1), "cividis")
    for row in means.itertuples():
        if row.method == "window":
            colour = colour_scale.to_rgba(row.position) if pd.notna(row.position) else "0.5"
            look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6, "zorder": 3}
        else:
            look = {"facecolor": "white", "edgecolor": edges[row.method], "linewidth": 1.6, "zorder": 2}
        ax.scatter(row.accuracy, row.retained_accuracy, marker=markers[row.lr], s=52, **look)
    bar = ax.figure.colorbar(colour_scale, ax=ax, pad=0.02)
    bar.set_label("position of the window")
    bar.outline.set_visible(False)

    plain = {"linestyle": "", "color": "0.3"}
    handles = [Line2D([], [], marker=markers[r], label=f"rate {r:g}", **plain) for r in rates]
    handles += [
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            markerfacecolor="white",
            markeredgecolor=edges[b],
            markeredgewidth=1.6,
            label=b,
        )
        for b in baselines
    ]
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
