"""Pictures of runs and of sweeps: what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import cycle
from numbers import Real
from textwrap import shorten

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import choice, instance, number, sequence, whole_number
from lora_lens.forgetting.aggregate import pareto_front, seed_means
from lora_lens.plots._style import colour_bar, house_style, literal, some_axes, styled
from lora_lens.training.run import Run

LABELS = {
    "accuracy": "accuracy on the new task",
    "retained_accuracy": "accuracy on the retained task",
    "forgetting": "forgetting",
    "loss_rise": "rise of the retained task's loss",
}
UNITS = {"accuracy": "%", "retained_accuracy": "%", "forgetting": "percentage points", "loss_rise": "nats"}
LOST = ("forgetting", "loss_rise")
PERCENT = FuncFormatter(lambda share, _: f"{round(100 * share, 6) + 0:.6g}")  # + 0: no minus before a zero
REFERENCE_LINES = {"LoRA": "--", "full fine-tuning": ":"}
MORE_LINES = ("-.", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 4)), (0, (9, 4)))  # other placements than one window
LONGEST_LABEL = 44  # characters
RATE_MARKERS = "osD^vP*X"
ALONG = {  # how the two scores of a run look along its steps
    "accuracy": ("new task", {"linestyle": "-", "marker": "o"}),
    "retained_accuracy": ("retained task", {"linestyle": "--", "marker": "s"}),
}
APART = 0.04  # ends of lines that are closer than this share one label


@styled
def learning_curve(run: Run, *, ax: Axes) -> Axes:
    """Accuracy on the new and on the retained task along one run."""
    instance(run, Run, "run", "a Run, which ll.finetune returns")
    for column, (label, look) in ALONG.items():
        if run.curve[column].notna().any():
            ax.plot(run.curve["step"], run.curve[column], label=label, **look)
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
def learning_curves(
    runs: Mapping[str, pd.DataFrame],
    steps: int,
    tasks: tuple[str, str] = ("new task", "retained task"),
    *,
    ax: Axes,
) -> Axes:
    """Accuracy on the new and on the retained task along several runs: the last in full, the others pale.

    Args:
        runs: the curve of each :class:`lora_lens.Run` by a short name, which stands at the ends of the pale
            lines. The last may still be empty; its two lines are the first of the Axes.
        steps: where the horizontal axis ends.
        tasks: what to call the two tasks.
    """
    instance(runs, Mapping, "runs", "a dict of curves, such as {'first': run.curve}")
    if not runs:
        raise InputError("there are no runs to show; pass a curve by its name, such as {'first': run.curve}")
    for curve in runs.values():
        instance(curve, pd.DataFrame, "each curve", "the curve of a Run, run.curve")
    steps = whole_number(steps, "steps", least=1)
    *earlier, last = runs.items()
    for (column, (_, look)), task in zip(ALONG.items(), tasks, strict=True):
        known = last[1].reindex(columns=["step", column])
        ax.plot(known["step"], known[column], label=literal(task), zorder=3, clip_on=False, **look)
    ends: list[tuple[float, float, str]] = []
    for (column, (_, look)), line in zip(ALONG.items(), list(ax.lines), strict=True):
        pale = {"color": line.get_color(), "alpha": 0.35, "linewidth": 1.3, "linestyle": look["linestyle"]}
        for name, curve in earlier:
            ax.plot(curve["step"], curve[column], zorder=1, **pale)
            ends.append((float(curve["step"].iloc[-1]), float(curve[column].iloc[-1]), name))
    for step, height, names in _labels(ends):
        place = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": "0.35"}
        ax.annotate(literal(names), (step, height), (6, 0), **place)
    handles = ax.get_legend_handles_labels()[0]
    if earlier:
        handles.append(Line2D([], [], color="0.35", alpha=0.5, linewidth=1.3, label="earlier runs"))
    beside = {"loc": "lower left", "bbox_to_anchor": (0, 1.01), "borderpad": 0, "borderaxespad": 0}
    ax.legend(handles=handles, ncols=3, handlelength=3, **beside)
    ax.set(xlabel="step", ylabel="test accuracy", xlim=(0, steps), ylim=(0, 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    return ax


def _labels(ends: Collection[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Step, height and names; lines that end close to each other have their names in one label."""
    groups: list[list[tuple[float, float, str]]] = []
    for end in sorted(ends):
        near = groups and groups[-1][0][0] == end[0] and end[1] - groups[-1][-1][1] < APART
        groups[-1].append(end) if near else groups.append([end])
    order = list(dict.fromkeys(name for *_, name in ends))
    return [
        (
            group[0][0],
            float(np.mean([height for _, height, _ in group])),
            " ".join(sorted({name for *_, name in group}, key=order.index)),
        )
        for group in groups
    ]


@styled
def forgetting_curve(
    table: pd.DataFrame, rates: Collection[float] | None = None, score: str = "forgetting", *, ax: Axes
) -> Axes:
    """Forgetting against the window's position; see :func:`accuracy_curve` for how to read it.

    Args:
        table, rates: as there.
        score: forgetting, of the accuracy; or loss_rise, of the loss, in nats per example, of a language
            task per token.

    Raises:
        ValueError: another ``score``, or no run of a window placed by position.
    """
    require_score(score, LOST)
    table = _swept(table, score)
    _against_position(table, score, rates, ax)
    _legend_beside(table, ax)
    what = "forgetting of the retained task" if score == "forgetting" else LABELS[score]
    ax.set(ylabel=with_unit(score), title=f"What is lost: {what}")
    show_unit(ax, score)
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
    table = _swept(table, "accuracy")
    _against_position(table, "accuracy", rates, ax)
    _legend_beside(table, ax)
    ax.set(ylabel="test accuracy (%)", title="What is gained: accuracy on the new task")
    show_unit(ax, "accuracy")
    return ax


def watched(
    results: pd.DataFrame,
    table: pd.DataFrame,
    rates: Collection[float] | None = None,
    score: str = "forgetting",
    *,
    columns: int = 3,
    axes: np.ndarray | None = None,
) -> np.ndarray:
    """What was forgotten of every watched task against the window's position, one panel per task.

    Each panel is read like :func:`accuracy_curve`.

    Args:
        results: from :meth:`lora_lens.Sweep.watched`.
        table: the same runs, from :func:`lora_lens.sweep`.
        rates: the learning rates to draw; default all.
        score: forgetting, on one scale for all tasks; or loss_rise, in nats per example, of a language task
            per token, each panel on its own scale.
        columns: panels in a row.
        axes: to draw on, at least one per task; default a new pyplot figure.

    Returns:
        The Axes, one per task in the order of ``results``, shape (tasks,).

    Raises:
        ValueError: another ``score``, a column is missing, a run of ``table`` has no results, there is no run
            of a window placed by position, or there are fewer ``axes`` than tasks.
    """
    require_score(score, LOST)
    table = checked(table, ["run", "method", "position", "lr"], once=True)
    results = checked(results, ["run", "task", score], "the table of watched tasks", "sweep.watched()")
    columns = whole_number(columns, "columns", least=1)
    if without := table.loc[~table["run"].isin(results["run"]), "run"].tolist():
        raise InputError(
            f"nothing was watched in {len(without)} runs, such as {without[0]}; pass sweep.watched()"
        )
    runs = table.drop(columns=score, errors="ignore")
    _require_placed(table)
    rates = chosen_rates(table, rates)
    tasks = list(results["task"].unique())
    with house_style():
        if axes is None:
            axes = _panels(len(tasks), columns, sharey=score == "forgetting")
        axes = some_axes(axes, len(tasks), "watched tasks")[: len(tasks)]
        for ax, task in zip(axes, tasks, strict=True):
            of_task = runs.merge(results.loc[results["task"] == task, ["run", score]], on="run")
            _against_position(of_task, score, rates, ax)
            ax.set(title=literal(task), xlabel="position of the window")
            ax.set_xticks(np.linspace(0, 1, 5), ["0", "0.25", "0.5", "0.75", "1"])
            show_unit(ax, score)
        axes[0].set_ylabel(
            "forgetting (percentage points)" if score == "forgetting" else "rise of the loss (nats)"
        )
        _legend_beside(table, axes[min(columns, len(tasks)) - 1])
    return axes


def with_unit(score: str) -> str:
    """A score in words, with its unit."""
    return f"{LABELS[score]} ({UNITS[score]})"


def show_unit(ax: Axes, score: str) -> None:
    """Let the ticks of the vertical axis count in the score's unit."""
    if UNITS[score] != "nats":
        ax.yaxis.set_major_formatter(PERCENT)


def require_score(score: str, choices: Collection[str] = tuple(LABELS)) -> None:
    choice(score, "score", choices)


def chosen_rates(table: pd.DataFrame, rates: Collection[float] | None) -> list[float]:
    """Those asked for, all by default, ascending.

    Raises:
        InputTypeError: they are no numbers.
        InputError: there are none, or the table has no run at one.
    """
    found = sorted(table["lr"].unique())
    if rates is None:
        return found
    wanted = [number(rate, "each of rates") for rate in sequence(rates, "rates", "learning rates", Real)]
    unknown = [rate for rate in wanted if rate not in found]
    if unknown or not wanted:
        asked = f"no runs at learning rate {unknown[0]:g}" if unknown else "rates, and none was asked for"
        raise InputError(f"the table has {asked}; choose from {', '.join(f'{rate:g}' for rate in found)}")
    return sorted(wanted)


def _swept(table: object, score: str) -> pd.DataFrame:
    return checked(table, ["method", "position", "lr", score], once=True)


def _require_placed(table: pd.DataFrame) -> None:
    if not ((table["method"] == "window") & table["position"].notna()).any():
        raise InputError("the table has no runs of windows placed by position")


def _panels(count: int, columns: int, *, sharey: bool) -> np.ndarray:
    """The Axes of a new figure in rows of ``columns``; shape (count,)."""
    columns = min(count, columns)
    rows = -(-count // columns)
    size = (2.7 * columns + 1.6, 2.7 * rows + 0.3)
    axes = plt.subplots(rows, columns, figsize=size, sharey=sharey, squeeze=False)[1].ravel()
    for ax in axes[count:]:
        ax.remove()
    return axes[:count]


def _against_position(table: pd.DataFrame, score: str, chosen: Collection[float] | None, ax: Axes) -> None:
    _require_placed(table)
    chosen = chosen_rates(table, chosen)
    swept = table[table["method"] == "window"].dropna(subset=["position"])
    rates = sorted(table["lr"].unique())
    colours = dict(zip(rates, sns.color_palette("colorblind", len(rates)), strict=True))
    lines = _reference_lines(table)
    for rate, marker in zip(rates, RATE_MARKERS * len(rates), strict=False):
        if rate not in chosen:
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


def _legend_beside(table: pd.DataFrame, ax: Axes) -> None:
    """The learning rates of the curves, then the methods of the flat lines, to the right of the Axes."""
    handles, _ = ax.get_legend_handles_labels()
    handles += [
        Line2D([], [], color="0.3", linestyle=line, linewidth=1.3, label=_short(name))
        for name, line in _reference_lines(table).items()
    ]
    ax.legend(handles=handles, title="learning rate", loc="center left", bbox_to_anchor=(1, 0.5))


def _reference_lines(table: pd.DataFrame) -> dict[str, object]:
    """A line style for every method that has no position, baselines first."""
    methods = [m for m in table["method"].unique() if m not in ("window", "linear probe", *REFERENCE_LINES)]
    known = {name: line for name, line in REFERENCE_LINES.items() if (table["method"] == name).any()}
    return known | dict(zip(methods, cycle(MORE_LINES), strict=False))


def _short(name: str) -> str:
    return literal(shorten(name, LONGEST_LABEL, placeholder=" ..."))


@styled
def tradeoff(
    table: pd.DataFrame, rates: Collection[float] | None = None, y: str = "retained_accuracy", *, ax: Axes
) -> Axes:
    """The trade-off plane: accuracy on the retained task against accuracy on the new one.

    One point per method and learning rate (mean over seeds): filled by
    position for windows, hollow for baselines, shaped by learning rate. The
    line joins the points that no other beats in both (the Pareto front).
    ``rates`` picks the learning rates to draw, all by default; each looks the
    same in every choice, and the front is that of the chosen. With ``y="loss_rise"`` the vertical axis is
    the rise of the retained task's loss, in nats, and runs downwards.

    Raises:
        ValueError: another ``y`` than retained_accuracy or loss_rise.
    """
    require_score(y, ("retained_accuracy", "loss_rise"))
    table = checked(
        table, ["method", "position", "lr", "accuracy", "retained_accuracy", "forgetting", y], once=True
    )
    chosen = chosen_rates(table, rates)
    means = seed_means(table.assign(retained_accuracy=table[y])).rename(columns={"retained_accuracy": y})
    every_rate = sorted(means["lr"].unique())
    markers = dict(zip(every_rate, RATE_MARKERS * len(every_rate), strict=False))
    baselines = [m for m in means["method"].unique() if m != "window"]
    edges = dict(zip(baselines, sns.color_palette("bright", len(baselines)), strict=True))

    means = means[means["lr"].isin(chosen)]
    better = means.assign(**{y: means[y] if y == "retained_accuracy" else -means[y]})
    front = means[pareto_front(better, y=y)].sort_values("accuracy")
    ax.step(front["accuracy"], front[y], where="pre", color="0.55", linewidth=1.3, zorder=1)
    colour_scale = ScalarMappable(plt.Normalize(0, 1), "cividis")
    for row, height in zip(means.itertuples(), means[y], strict=True):
        if row.method == "window":
            colour = colour_scale.to_rgba(row.position) if pd.notna(row.position) else "0.5"
            look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6, "zorder": 3}
        else:
            look = {"facecolor": "white", "edgecolor": edges[row.method], "linewidth": 1.6, "zorder": 2}
        ax.scatter(row.accuracy, height, marker=markers[row.lr], s=52, **look)
    colour_bar(colour_scale, ax, "position of the window")

    plain = {"linestyle": "", "color": "0.3"}
    handles = [Line2D([], [], marker=markers[r], label=f"rate {r:g}", **plain) for r in chosen]
    hollow = {"marker": "o", "linestyle": "", "markerfacecolor": "white", "markeredgewidth": 1.6}
    handles += [Line2D([], [], markeredgecolor=edges[b], label=_short(b), **hollow) for b in baselines]
    handles.append(Line2D([], [], color="0.55", linewidth=1.3, label="Pareto front"))
    ax.legend(handles=handles, loc="best")
    ax.xaxis.set_major_formatter(PERCENT)
    show_unit(ax, y)
    if y == "loss_rise":
        ax.invert_yaxis()
    ax.set(
        xlabel=with_unit("accuracy"),
        ylabel=with_unit(y),
        title="The trade-off: up and to the right is better",
    )
    return ax
