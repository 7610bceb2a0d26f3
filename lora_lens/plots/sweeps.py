"""Pictures of sweeps: what was gained, and what it cost."""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle
from numbers import Real

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from lora_lens._base.errors import InputError
from lora_lens._base.schema import checked
from lora_lens._base.validate import number, sequence, whole_number
from lora_lens.forgetting.aggregate import pareto_front, seed_means
from lora_lens.plots._scores import (
    LOST,
    PERCENT,
    in_words,
    line_in_range,
    method_colours,
    placed_windows,
    plane_legend,
    position_bar,
    position_colour,
    position_ticks,
    rate_markers,
    require_placed,
    require_score,
    shortened,
    show_unit,
    with_unit,
)
from lora_lens.plots._style import house_style, literal, panels, some_axes, styled

REFERENCE_LINES = {"LoRA": "--", "full fine-tuning": ":"}
MORE_LINES = ("-.", (0, (7, 2, 1, 2, 1, 2)), (0, (1, 4)), (0, (9, 4)))  # other placements than one window
FRONT = "0.55"


@styled
def forgetting_curve(
    table: pd.DataFrame, rates: Collection[float] | None = None, score: str = "forgetting", *, ax: Axes
) -> Axes:
    """Forgetting against the window's position; see :func:`accuracy_curve` for how to read it.

    Args:
        table: from :func:`lora_lens.sweep`.
        rates: the learning rates to draw; default all.
        score: forgetting, of the accuracy; or loss_rise, of the loss, in nats per example, of a language
            task per token.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``score``, or no run of a window placed by position.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.forgetting_curve(sweep.table).get_ylabel()
        'forgetting (percentage points)'
    """
    require_score(score, LOST)
    table = _swept(table, score)
    _against_position(table, score, rates, ax)
    _legend_beside(table, ax)
    what = "forgetting of the retained task" if score == "forgetting" else in_words(score, table)
    ax.set(ylabel=with_unit(score, table), title=f"What is lost: {what}")
    show_unit(ax, score)
    return ax


@styled
def accuracy_curve(table: pd.DataFrame, rates: Collection[float] | None = None, *, ax: Axes) -> Axes:
    """Accuracy on the new task against the window's position, from a sweep's table.

    One line per learning rate: the mean over seeds, in a band from the lowest
    to the highest seed. Flat lines are ordinary LoRA (dashed), full
    fine-tuning (dotted) and other placements at the same rate, as far as the
    table holds them.

    Args:
        table: from :func:`lora_lens.sweep`.
        rates: the learning rates to draw, each of which looks the same in every choice; default all.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: there is no run of a window placed by position, or none at one of ``rates``.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.accuracy_curve(sweep.table, rates=[0.002, 0.005]).get_ylabel()
        'test accuracy (%)'
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

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/smollm2.jsonl.xz")
        >>> [ax.get_title() for ax in ll.plots.watched(sweep.watched(), sweep.table)]
        ['products', 'tweets', 'newspaper']
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
    require_placed(table)
    rates = chosen_rates(table, rates)
    tasks = list(results["task"].unique())
    with house_style():
        if axes is None:
            share = score == "forgetting"
            axes = panels(len(tasks), columns, more=(1.6, 0.3), sharey=share)
        axes = some_axes(axes, len(tasks), "watched tasks")[: len(tasks)]
        for ax, task in zip(axes, tasks, strict=True):
            of_task = runs.merge(results.loc[results["task"] == task, ["run", score]], on="run")
            _against_position(of_task, score, rates, ax)
            ax.set(title=literal(task), xlabel="position of the window")
            position_ticks(ax)
            show_unit(ax, score)
        axes[0].set_ylabel(
            "forgetting (percentage points)" if score == "forgetting" else "rise of the loss (nats)"
        )
        _legend_beside(table, axes[min(columns, len(tasks)) - 1])
    return axes


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


def _against_position(table: pd.DataFrame, score: str, chosen: Collection[float] | None, ax: Axes) -> None:
    require_placed(table)
    chosen = chosen_rates(table, chosen)
    swept = table[placed_windows(table)]
    markers = rate_markers(table["lr"])
    lines = _reference_lines(table)
    for (rate, marker), colour in zip(
        markers.items(), sns.color_palette("colorblind", len(markers)), strict=True
    ):
        if rate not in chosen:
            continue
        by_position = swept[swept["lr"] == rate].groupby("position")[score]
        line_in_range(ax, by_position, color=colour, marker=marker, label=f"{rate:g}")
        for name, line in lines.items():
            reference = table.loc[(table["method"] == name) & (table["lr"] == rate), score].mean()
            if pd.notna(reference):
                ax.axhline(reference, color=colour, linestyle=line, linewidth=1.3)
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
        Line2D([], [], color="0.3", linestyle=line, linewidth=1.3, label=shortened(name))
        for name, line in _reference_lines(table).items()
    ]
    ax.legend(handles=handles, title="learning rate", loc="center left", bbox_to_anchor=(1, 0.5))


def _reference_lines(table: pd.DataFrame) -> dict[str, object]:
    """A line style for every method that has no position, baselines first."""
    methods = [m for m in table["method"].unique() if m not in ("window", "linear probe", *REFERENCE_LINES)]
    known = {name: line for name, line in REFERENCE_LINES.items() if (table["method"] == name).any()}
    return known | dict(zip(methods, cycle(MORE_LINES), strict=False))


@styled
def tradeoff(
    table: pd.DataFrame, rates: Collection[float] | None = None, y: str = "retained_accuracy", *, ax: Axes
) -> Axes:
    """The trade-off plane: accuracy on the retained task against accuracy on the new one.

    One point per method and learning rate (mean over seeds): filled by
    position for windows, hollow for baselines, shaped by learning rate. The
    line joins the points that no other beats in both (the Pareto front).

    Args:
        table: from :func:`lora_lens.sweep`.
        rates: the learning rates to draw, of which the front is made; each looks the same in every choice.
            Default all.
        y: retained_accuracy; or loss_rise, of the retained task, in nats, which runs downwards.
        ax: to draw on; default a new pyplot figure.

    Raises:
        ValueError: another ``y`` than retained_accuracy or loss_rise.

    Example:
        >>> import lora_lens as ll
        >>> sweep = ll.Sweep.open("data/results/digits.jsonl.xz")
        >>> ll.plots.tradeoff(sweep.table, rates=[0.002, 0.005, 0.01]).get_ylabel()
        'accuracy on the retained task (%)'
    """
    require_score(y, ("retained_accuracy", "loss_rise"))
    table = checked(
        table, ["method", "position", "lr", "accuracy", "retained_accuracy", "forgetting", y], once=True
    )
    chosen = chosen_rates(table, rates)
    means = seed_means(table.assign(retained_accuracy=table[y])).rename(columns={"retained_accuracy": y})
    markers, edges = rate_markers(means["lr"]), method_colours(means["method"])
    means = means[means["lr"].isin(chosen)]
    better = means.assign(**{y: means[y] if y == "retained_accuracy" else -means[y]})
    front = means[pareto_front(better, y=y)].sort_values("accuracy")
    ax.step(front["accuracy"], front[y], where="pre", color=FRONT, linewidth=1.3, zorder=1)
    for row, height in zip(means.itertuples(), means[y], strict=True):
        if row.method == "window":
            colour = position_colour(row.position)
            look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6, "zorder": 3}
        else:
            look = {"facecolor": "white", "edgecolor": edges[row.method], "linewidth": 1.6, "zorder": 2}
        ax.scatter(row.accuracy, height, marker=markers[row.lr], s=52, **look)
    position_bar(ax)
    shown = {rate: markers[rate] for rate in chosen}
    ax.legend(handles=plane_legend(shown, edges, "Pareto front", FRONT), loc="best")
    ax.xaxis.set_major_formatter(PERCENT)
    show_unit(ax, y)
    if y == "loss_rise":
        ax.invert_yaxis()
    ax.set(
        xlabel=with_unit("accuracy", table),
        ylabel=with_unit(y, table),
        title="The trade-off: up and to the right is better",
    )
    return ax
